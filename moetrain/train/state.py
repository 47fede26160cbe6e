"""What a checkpoint holds: everything that the next step depends on."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.format import EXTRA
from moetrain.checkpoint.manifest import read_manifest
from moetrain.checkpoint.saved_state import SavedState
from moetrain.checkpoint.state_dict import rng_state, set_rng_state
from moetrain.data import TrainLoader
from moetrain.errors import UserError
from moetrain.moe.balance import Controller
from moetrain.train.alarms import AlarmWatch
from moetrain.train.engine import Engine
from moetrain.train.identity import IDENTITY
from moetrain.train.log.monitor import LossMonitor, ThroughputMeter
from moetrain.train.task import Task


def state_tensors(engine: Engine, controllers: Sequence[Controller]) -> dict[str, Tensor]:
    """Name -> live tensor of model, optimizer and controllers."""
    tensors = engine.model_tensors() | engine.optimizer_tensors()
    for controller in controllers:
        tensors |= {f"controller.{name}": tensor for name, tensor in controller.tensors().items()}
    return tensors


@dataclass
class TrainState:
    """The live objects of a run, and its position. ``step`` counts finished optimizer steps."""

    engine: Engine
    controllers: Sequence[Controller]
    loader: TrainLoader
    monitor: LossMonitor
    meter: ThroughputMeter
    step: int = 0
    tokens: int = 0
    alarms: AlarmWatch | None = None  # of a run; rank 0 observes
    skipped: tuple[int, ...] = ()  # steps (from 0) whose batch is left out, after a rollback
    rng: dict[str, Any] | None = None  # of the checkpoint that was loaded
    identity: Mapping[str, str] | None = None  # of the run folder's files; rank 0 knows it

    @property
    def task(self) -> Task:
        return self.engine.task

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor; a load fills them in place."""
        return state_tensors(self.engine, self.controllers)

    def save(self, checkpointer: Checkpointer) -> Path:
        """Write a checkpoint of the state after ``step`` steps."""
        extra: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            "skipped": list(self.skipped),
            "loader": self.loader.state_dict(),
            "monitor": self.monitor.state_dict(),
            "meter": self.meter.state_dict(),
            "rng": rng_state(),
        }
        if self.alarms is not None:
            extra["alarms"] = self.alarms.state_dict()
        if self.identity is not None:
            extra[IDENTITY] = dict(self.identity)
        return checkpointer.save(self.step, self.tensors(), extra)

    def load(self, checkpointer: Checkpointer, path: Path) -> None:
        """Load the state of the checkpoint at ``path`` into the live objects.

        Raises UserError, before anything is changed, if it is damaged, malformed, or of another run.
        """
        tensors = self.tensors()
        extra = checkpointer.load(path, tensors, check=partial(self._check, path))
        self.engine.take(tensors)
        saved = SavedState.of(extra, str(path / EXTRA))
        self.step, self.tokens, self.skipped = saved.step, saved.tokens, saved.skipped
        self.loader.load_state_dict(extra["loader"])
        self.monitor.load_state_dict(extra["monitor"])
        self.meter.load_state_dict(extra["meter"])
        if self.alarms is not None:
            self.alarms.load_state_dict(saved.alarms)
        self.rng = extra["rng"]
        set_rng_state(self.rng)

    def _check(self, path: Path, extra: Mapping[str, Any]) -> None:
        saved = SavedState.of(extra, str(path / EXTRA))
        if saved.step != (written := read_manifest(path).step):
            raise UserError(f"{path / EXTRA} is of step {saved.step}, its manifest of step {written}")
        self.loader.check_state_dict(extra["loader"])

    def start(self, seed: int) -> None:
        """Set the random state to the checkpoint's, or seed it. Call it just before the first step.

        Not earlier, since importing a library may draw a number.
        """
        if self.rng is not None:
            set_rng_state(self.rng)
        else:  # torch was seeded before it drew the weights
            random.seed(seed)
            np.random.seed(seed % 2**32)
