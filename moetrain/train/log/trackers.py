"""Trackers, which receive metrics besides ``metrics.jsonl``: TensorBoard, Weights & Biases, or none."""

from __future__ import annotations

from collections.abc import Callable

from moetrain.errors import UserError
from moetrain.train.log.background import Background
from moetrain.train.log.options import TrackerConfig
from moetrain.train.log.tensorboard_files import TensorboardTracker
from moetrain.train.log.tracker import NoTracker, Tracker
from moetrain.train.log.wandb_run import WandbRun

TRACKERS: dict[str, Callable[[TrackerConfig], Tracker]] = {
    "jsonl": lambda cfg: NoTracker(),
    "tensorboard": TensorboardTracker,
    "wandb": WandbRun,
}


def build_tracker(cfg: TrackerConfig, rank: int = 0) -> Tracker:
    """The tracker that ``cfg.name`` names. Call it on every rank: a missing package is found on all of them.

    Raises UserError if the name is unknown or its package is missing.
    """
    if cfg.name not in TRACKERS:
        raise UserError(f"tracker.name={cfg.name!r} is unknown; choose one of {', '.join(sorted(TRACKERS))}")
    tracker = TRACKERS[cfg.name](cfg)
    return NoTracker() if rank != 0 or type(tracker) is NoTracker else Background(cfg.name, tracker)
