"""``moetrain router list`` and ``check``."""

from __future__ import annotations

from moetrain.commands.plain import plain
from moetrain.router_tools import router_command


def run(args: list[str]) -> int:
    return plain(router_command, args)
