"""``hydra.main`` for sweeps and for Hydra's own pages, without its folders, logs or change of directory."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moetrain.config.help import app_help
from moetrain.config.hydra.compose import HYDRA_VERSION_BASE, check_composes, prepare
from moetrain.config.hydra.store import CONFIG_DIR
from moetrain.config.init_from import source_overrides
from moetrain.errors import UserError
from moetrain.parallel.environment import is_rank_0
from moetrain.terminal import show

# Logging "none" leaves logging alone; "disabled" would silence our own loggers too.
_QUIET = [
    "hydra.job.name=moetrain",
    "hydra.job.chdir=false",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
    "hydra.sweep.subdir=.",
]


def print_page(root: type, command: str, flags: argparse.Namespace) -> int:
    """``--help``, which is ours, and Hydra's ``--cfg``, ``--info`` and ``--hydra-help``. Rank 0 prints."""
    flags.overrides = [
        *source_overrides(root, flags.overrides, flags.config_name, flags.config_dir),
        *flags.overrides,
    ]
    node = check_composes(root, flags.overrides, flags.config_name, flags.config_dir)
    with contextlib.nullcontext() if is_rank_0() else contextlib.redirect_stdout(io.StringIO()):
        if flags.help:
            show(app_help(command, flags.config_dir) + OmegaConf.to_yaml(node), end="")
            return 0
        return hydra_main(flags, flags.page, prepare(root, flags.overrides, flags.config_dir), _nothing)


def hydra_main(
    flags: argparse.Namespace, switches: list[str], overrides: list[str], task: Callable[[DictConfig], Any]
) -> int:
    """Call ``hydra.main``, which reads ``sys.argv``; returns its exit code and raises a task's exceptions."""
    if flags.config_dir is not None:
        switches = [*switches, "--config-dir", flags.config_dir]
    main = hydra.main(
        config_path=str(CONFIG_DIR), config_name=flags.config_name, version_base=HYDRA_VERSION_BASE
    )
    argv = ["moetrain", *switches, *_QUIET, *overrides]
    with _replaced(sys, "argv", argv), _full_errors(), _root_logger_kept():
        try:
            main(task)()
        except SystemExit as e:
            return e.code if isinstance(e.code, int) else int(e.code is not None)
        except (HydraException, OmegaConfBaseException) as e:
            raise UserError(str(e).strip().splitlines()[0]) from e
    return 0


def _nothing(node: DictConfig) -> None:
    """Hydra wants a task even where it only prints."""


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _full_errors() -> Iterator[None]:
    """Make Hydra raise to us instead of printing and exiting with 1."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """``--info`` prints by a handler on the root logger."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
