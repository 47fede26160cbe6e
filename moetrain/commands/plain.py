"""What the commands with argparse share."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable

from moetrain.errors import UserError
from moetrain.terminal import tell


def plain(command: Callable[[list[str]], int], args: list[str]) -> int:
    """Run an argparse command: what it says of a wrong argument becomes a UserError's one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return command(args)
    except SystemExit as e:
        if not e.code:
            return 0
        raise UserError(said.getvalue().strip().rpartition("error: ")[2]) from e
    finally:
        if said.getvalue().strip() and "error: " not in said.getvalue():
            tell(said.getvalue().rstrip("\n"), sys.stderr)
