"""What a tracker refuses of its settings."""

from __future__ import annotations

import importlib
from typing import Any

from moetrain.errors import UserError
from moetrain.packages import is_installed
from moetrain.train.log.options import TrackerConfig

_PACKAGES = ("wandb", "tensorboard")  # trackers, and extras, of the same names


def check_tracker(cfg: TrackerConfig) -> None:
    """Raise UserError where the tracker's package is not installed."""
    if cfg.name in _PACKAGES and not is_installed(cfg.name):
        raise missing(cfg.name)


def missing(package: str) -> UserError:
    """The error of a tracker whose package is not there."""
    return UserError(
        f"tracker={package} needs the package {package}, which is not installed: "
        f"pip install 'moetrain[{package}]', or set tracker=jsonl"
    )


def need(package: str) -> Any:
    """Import an optional package, or say how to install it.

    A folder of that name in the working directory (wandb makes one) imports as an empty package.
    """
    try:
        module = importlib.import_module(package)
    except ImportError:
        module = None
    if module is None or module.__file__ is None:
        raise missing(package)
    return module
