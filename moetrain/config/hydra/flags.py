"""The flags of the Hydra commands, parsed before Hydra sees them: every mistake is one line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from moetrain.errors import UserError
from moetrain.nearest import nearest

_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


class _Parser(argparse.ArgumentParser):
    """Errors as UserError, with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see moetrain {self.prog} --help")


def parse_flags(command: str, argv: list[str]) -> argparse.Namespace:
    """Overrides and flags; ``page`` holds Hydra's own flags where something is to be printed, not run."""
    parser = _Parser(prog=command, add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--hydra-help", action="store_true")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--package", "-p")
    parser.add_argument("--info", "-i", nargs="?", const="all", choices=_INFO)
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-name", "-cn")
    flags, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        known = [o for a in parser._actions for o in a.option_strings if o.startswith("--")]
        raise UserError(f"unknown option {unknown[0]}{nearest(unknown[0].split('=')[0], known)}")
    if flags.config_dir is not None:
        flags.config_dir = str(Path(flags.config_dir).resolve())
    flags.multirun = flags.multirun or "hydra.mode=MULTIRUN" in flags.overrides
    flags.config_name = flags.config_name or command
    flags.page = _page(flags)
    return flags


def _page(flags: argparse.Namespace) -> list[str]:
    """Hydra's flags of the page to print, none where something is to be run."""
    pages = [["--cfg", flags.cfg]] if flags.cfg else []
    pages += [["--info", flags.info]] if flags.info else []
    pages += [["--help"]] if flags.help else []
    pages += [["--hydra-help"]] if flags.hydra_help else []
    if len(pages) + flags.multirun > 1:
        raise UserError("give only one of --cfg, --info, --help, --hydra-help and --multirun")
    if (flags.resolve or flags.package) and not flags.cfg:
        raise UserError("--resolve and --package go with --cfg")
    page = pages[0] if pages else []
    page += ["--resolve"] if flags.resolve else []
    return page + (["--package", flags.package] if flags.package else [])
