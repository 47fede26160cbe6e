"""The tracker ``tensorboard``: event files in the run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetrain.errors import UserError
from moetrain.train.log.loads import Loads, heat_map, loads_of, shown_layers
from moetrain.train.log.options import TrackerConfig
from moetrain.train.log.rules import need
from moetrain.train.log.tracker import numbers
from moetrain.train.log.wandb_rows import kind_of


class TensorboardTracker:
    """Event files in ``<run>/tensorboard``. What a resumed run does again replaces what was written.

    After a rollback the steps that are done again are equal, and are left out.
    """

    def __init__(self, cfg: TrackerConfig) -> None:
        need("tensorboard")
        self._writer: Any = None
        self._last = {"train": 0, "val": -1}  # an evaluation before the first step is of step 0

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run_dir / "tensorboard"
        try:
            self._writer = SummaryWriter(str(folder), purge_step=step and step + 1)
        except OSError as error:
            raise UserError(f"tracker=tensorboard cannot write to {folder}: {error}") from None
        text = json.dumps(config, indent=2, default=str)
        self._writer.add_text("config", f"```\n{text}\n```", global_step=step)

    def log(self, row: Mapping[str, Any], step: int, loads: Loads | None = None) -> None:
        kind = kind_of(row)
        if step <= self._last[kind]:
            return
        self._last[kind] = step
        for key, value in numbers(row).items():
            self._writer.add_scalar(key, value, global_step=step)
        if loads:
            self._writer.add_image("load/map", heat_map(loads), global_step=step, dataformats="HWC")
            for layer in shown_layers(list(loads)):
                self._writer.add_histogram(
                    f"load/layer_{layer}", loads_of(loads[layer]), global_step=step, bins="auto"
                )

    def alert(self, title: str, text: str, step: int) -> None:
        if step > self._last["train"]:
            self._writer.add_text("alarms", f"**{title}** {text}", global_step=step)

    def checkpoint(self, folder: Path, step: int) -> None:
        pass

    def finish(self, ok: bool) -> None:
        self._writer.close()

    def abandon(self) -> None:
        pass
