"""The rows that a Weights & Biases run has already, so that a resumed run writes none of them twice.

Offline a row that is written stays, and online it cannot be taken back without losing what follows. What
training does again after a resume or a rollback is equal, bit for bit, to what was logged; with another
config it is not, and goes to a run of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from moetrain.errors import UserError
from moetrain.files import read_json

LOGGED_FILE = "wandb_logged.json"
_WIDTH = 256  # bytes of the file; always as many, so that one write replaces it
_Step = Annotated[int, Field(ge=0, lt=2**63)]
_Evaluated = Annotated[int, Field(ge=-1, lt=2**63)]
# What does not change the rows of a step.
_ELSEWHERE = (
    "run",
    "resume",
    "tracker",
    "compare",
    "checkpoint",
    "parallel",
    "plugins",
    "counts",
    "environment",
    "alarms",
)
_LOOP = (
    "steps",
    "threads",
    "eval_every",
    "eval_first",
    "eval_samples",
    "sample_prompt",
    "sample_tokens",
    "on_nonfinite",
)


def kind_of(row: Mapping[str, Any]) -> str:
    """``val`` for the row of an evaluation, else ``train``: a step may have one of each."""
    return "val" if any(key.startswith("val/") for key in row) else "train"


@dataclass(frozen=True)
class Logged:
    """The last steps of which the run ``id`` has the row of training (``train``) and evaluation (``val``).

    An evaluation before the first step is of step 0, so that ``val`` is -1 where there was none.
    """

    id: str = Field(max_length=64)
    config: str = Field(max_length=64)
    train: _Step = 0
    val: _Evaluated = -1


class LoggedRows:
    """Reads and writes ``<run>/wandb_logged.json``. ``now``: the rows that the run ``run_id`` has."""

    def __init__(self, run_dir: Path, run_id: str, config: Mapping[str, Any]) -> None:
        self._path = run_dir / LOGGED_FILE
        self._file: int | None = None
        self._config = _fingerprint(config)
        self.now = self._read(run_id) or Logged(run_id, self._config)

    def diverge(self, step: int) -> bool:
        """Whether the run has rows after ``step`` that will be computed again with other values."""
        again = self.now.train > step or step == 0 == self.now.val
        return again and self.now.config != self._config

    def begin(self, run_id: str) -> None:
        """Set the run that gets all further rows: the one that was read, or a new one."""
        same = self.now.id == run_id
        self.now = (
            dataclasses.replace(self.now, config=self._config) if same else Logged(run_id, self._config)
        )
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._write()

    def is_new(self, row: Mapping[str, Any], step: int) -> bool:
        """Whether the run lacks this row; it counts as written from here on."""
        now = self.now
        if kind_of(row) == "val":
            after = dataclasses.replace(now, val=max(now.val, step))
        else:
            after = dataclasses.replace(now, train=max(now.train, step))
        if after == now:
            return False
        self.now = after
        self._write()
        return True

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _read(self, run_id: str) -> Logged | None:
        try:
            found = read_json(self._path, Logged, 2 * _WIDTH)
        except UserError:  # there is none yet, or it is damaged: then rows may come twice
            return None
        return found if found.id == run_id else None

    def _write(self) -> None:
        assert self._file is not None
        text = json.dumps(dataclasses.asdict(self.now))
        os.pwrite(self._file, text.ljust(_WIDTH - 1).encode() + b"\n", 0)


def _fingerprint(config: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in config.items() if key not in _ELSEWHERE}
    loop = kept.get("train")
    if isinstance(loop, Mapping):
        kept["train"] = {key: value for key, value in loop.items() if key not in _LOOP}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]
