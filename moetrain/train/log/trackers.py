"""Trackers, which receive metrics besides ``metrics.jsonl``: TensorBoard, Weights & Biases, or none.

A tracker exists on rank 0 only. If it fails during training it warns once and stops; the run goes on.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from moetrain.errors import UserError
from moetrain.files import read_bytes
from moetrain.terminal import as_text
from moetrain.train.log.options import TrackerConfig, WandbTracker
from moetrain.train.log.rules import missing
from moetrain.train.log.wandb_rows import LoggedRows, kind_of
from moetrain.writing import write_atomic

_log = logging.getLogger(__name__)

WANDB_ID_FILE = "wandb_run_id"
_START_SECONDS = 60.0
_FINISH_SECONDS = 120.0  # how long the end of a run may wait for an upload


class Tracker(Protocol):
    """The interface of a tracker.

    ``step`` of :meth:`start` is the last finished step of a resumed run, 0 for a fresh one. ``config``:
    the composed config as plain values. ``finish(ok=False)`` marks the run as failed.
    """

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None: ...

    def log(self, row: Mapping[str, Any], step: int) -> None: ...

    def finish(self, ok: bool) -> None: ...


class NoTracker:
    """The tracker that does nothing: of ``tracker=jsonl``, and of every rank but the first."""

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None:
        pass

    def log(self, row: Mapping[str, Any], step: int) -> None:
        pass

    def finish(self, ok: bool) -> None:
        pass


class TensorboardTracker:
    """Event files in ``<run>/tensorboard``. What a resumed run does again replaces what was written.

    After a rollback the steps that are done again are equal, and are left out.
    """

    def __init__(self, cfg: TrackerConfig) -> None:
        _need("tensorboard")
        self._writer: Any = None
        self._last = {"train": 0, "val": 0}

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run_dir / "tensorboard"
        try:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        except OSError as error:
            raise UserError(f"tracker=tensorboard cannot write to {folder}: {error}") from None
        text = json.dumps(config, indent=2, default=str)
        self._writer.add_text("config", f"```\n{text}\n```", global_step=step)

    def log(self, row: Mapping[str, Any], step: int) -> None:
        kind = kind_of(row)
        if step <= self._last[kind]:
            return
        self._last[kind] = step
        for key, value in _numbers(row).items():
            self._writer.add_scalar(key, value, global_step=step)

    def finish(self, ok: bool) -> None:
        self._writer.close()


class WandbRun:
    """One Weights & Biases run per run folder, resumed under the id kept in ``<run>/wandb_run_id``.

    Rows go without wandb's own step counter, which refuses to go back: ``step`` is their x axis instead. Rows
    that the run has are not written again; steps done again with another config begin a run of their own.
    """

    def __init__(self, cfg: TrackerConfig) -> None:
        assert isinstance(cfg, WandbTracker)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._wandb = _need("wandb")
        self._cfg = cfg
        self._run: Any = None
        self._rows: LoggedRows | None = None

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None:
        cfg = self._cfg
        if (
            os.path.expanduser("~") == "~"
        ):  # nobody knows a home folder, and wandb looks for its settings there
            os.environ["HOME"] = str(run_dir.resolve() / "wandb")
        kept = _kept_id(run_dir)
        rows = LoggedRows(run_dir, kept or secrets.token_hex(4), config)
        run_id = secrets.token_hex(4) if rows.diverge(step) else rows.now.id
        settings = self._wandb.Settings(
            save_code=False,
            disable_code=True,
            disable_git=True,
            console="off",
            init_timeout=_START_SECONDS,
            finish_timeout=_FINISH_SECONDS,
        )
        try:
            self._run = self._wandb.init(
                project=as_text(cfg.project),
                entity=None if cfg.entity is None else as_text(cfg.entity),
                tags=[as_text(tag) for tag in cfg.tags] or None,
                mode=cfg.mode.value,
                name=as_text(run_dir.resolve().name),
                id=run_id,
                resume="allow",
                dir=str(run_dir),
                config=json.loads(as_text(json.dumps(config, ensure_ascii=False, default=str))),
                settings=settings,
            )
        except Exception as error:  # its own, the network's, pydantic's, or of a user without a home folder
            line = " ".join(str(error).split())
            raise UserError(
                f"tracker=wandb did not start (tracker.mode={cfg.mode.value}): {line}; check the network and "
                "`wandb login`, or take tracker.mode=offline and upload with `wandb sync` later"
            ) from None
        _keep_id(run_dir, run_id)
        self._begin_rows(rows, run_id, step)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _begin_rows(self, rows: LoggedRows, run_id: str, step: int) -> None:
        """Say which steps the run has, or why it has another id than before."""
        before = rows.now
        if before.id != run_id:
            _log.warning(
                "tracker=wandb: steps %d to %d are in the run %s with another config: this run goes on as %s",
                step + 1, before.train, before.id, run_id,
            )  # fmt: skip
        elif before.train > step:
            _log.info("tracker=wandb: the run %s has the rows up to step %d already", run_id, before.train)
        rows.begin(run_id)
        self._rows = rows

    def log(self, row: Mapping[str, Any], step: int) -> None:
        assert self._rows is not None
        if self._rows.is_new(row, step):
            self._run.log({**_numbers(row), "step": step})

    def finish(self, ok: bool) -> None:
        if self._rows is not None:
            self._rows.close()
        self._run.finish(exit_code=0 if ok else 1)


class _Guarded:
    """Wraps a tracker: its first error after the start is logged as a warning, and it is not called again."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name = name
        self._tracker = tracker
        self._alive = False

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None:
        self._tracker.start(run_dir, config, step)
        self._alive = True

    def log(self, row: Mapping[str, Any], step: int) -> None:
        self._try(lambda: self._tracker.log(row, step), f"failed at step {step}")

    def finish(self, ok: bool) -> None:
        self._try(lambda: self._tracker.finish(ok), "failed to finish")
        self._alive = False

    def _try(self, action: Callable[[], None], what: str) -> None:
        if not self._alive:
            return
        try:
            action()
        except Exception as error:  # whatever a network client raises must not end the training
            self._alive = False
            reason = f"{type(error).__name__}: {error}"
            _log.warning("tracker=%s %s and is off from here on (%s)", self._name, what, reason)


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
    return _Guarded(cfg.name, tracker) if rank == 0 else NoTracker()


def _need(package: str) -> Any:
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


def _kept_id(run_dir: Path) -> str | None:
    """The id kept in the run folder, if there is one that wandb would take."""
    path = run_dir / WANDB_ID_FILE
    if not path.exists():
        return None
    kept = read_bytes(path, 1000).decode("utf-8", "replace").strip()
    return kept if re.fullmatch(r"[\w-]{1,64}", kept, re.ASCII) else None


def _keep_id(run_dir: Path, run_id: str) -> None:
    write_atomic(run_dir / WANDB_ID_FILE, run_id + "\n")


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numeric entries of a row; NaN stays (both services show it), None and text go."""
    return {k: float(v) for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
