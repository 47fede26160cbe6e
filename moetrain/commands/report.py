"""``moetrain report``: plots and tables of runs in one HTML file."""

from __future__ import annotations

from moetrain.commands.plain import plain
from moetrain.report import report_command


def run(args: list[str]) -> int:
    return plain(report_command, args)
