"""What the commands that Hydra composes share: a config from their words, or a printed page."""

from __future__ import annotations

from typing import TypeVar

from moetrain.config.hydra.compose import compose_app
from moetrain.config.hydra.flags import parse_flags
from moetrain.config.hydra.overrides import refuse_hydra
from moetrain.config.pages import print_page
from moetrain.errors import UserError
from moetrain.parallel.environment import world_size

T = TypeVar("T")


def composed(command: str, root: type[T], args: list[str]) -> T | None:
    """The config of a command without sweeps; None where a page was asked for and printed."""
    flags = parse_flags(command, args)
    if flags.page:
        print_page(root, command, flags)
        return None
    if flags.multirun:
        raise UserError(f"-m: {command} has no sweeps; train has")
    refuse_hydra(flags.overrides, sweep=False)
    return compose_app(root, flags.config_name, flags.overrides, flags.config_dir)


def refuse_ranks(command: str, does: str) -> None:
    """UserError where a command that needs no launcher was started by one; ``does``: what it does instead."""
    if world_size() > 1:
        raise UserError(f"{command} {does}, but WORLD_SIZE={world_size()}: run it without torchrun")
