"""``moetrain status``: where runs stand."""

from __future__ import annotations

from moetrain.commands.plain import plain
from moetrain.report import status_command


def run(args: list[str]) -> int:
    return plain(status_command, args)
