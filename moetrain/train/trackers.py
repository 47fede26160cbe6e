"""Where metrics go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, or nowhere.

A tracker lives on rank 0 only. One that fails during training warns once and falls silent; the run goes on.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from moetrain.config.schema import TrackerConfig, WandbTracker
from moetrain.errors import UserError

_log = logging.getLogger(__name__)

WANDB_ID_FILE = "wandb_run_id"
_START_SECONDS = 60.0
_FINISH_SECONDS = 120.0  # how long the end of a run may wait for an upload


class Tracker(Protocol):
    """``step`` of :meth:`start` is the last finished step of a resumed run, 0 for a fresh one.

    ``config`` is the composed config as plain values. ``finish(ok=False)`` marks the run as failed.
    """

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None: ...

    def log(self, row: Mapping[str, Any], step: int) -> None: ...

    def finish(self, ok: bool) -> None: ...


class NoTracker:
    """``tracker=jsonl``, and every rank but the first."""

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None:
        pass

    def log(self, row: Mapping[str, Any], step: int) -> None:
        pass

    def finish(self, ok: bool) -> None:
        pass


class TensorboardTracker:
    """Event files in ``<run>/tensorboard``. What a resumed run does again replaces what was written."""

    def __init__(self, cfg: TrackerConfig) -> None:
        _need("tensorboard")
        self._writer: Any = None

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run_dir / "tensorboard"
        try:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        except OSError as error:
            raise UserError(f"tracker=tensorboard cannot write to {folder}: {error}") from None
        text = json.dumps(config, indent=2, default=str)
        self._writer.add_text("config", f"```\n{text}\n```", global_step=step)

    def log(self, row: Mapping[str, Any], step: int) -> None:
        for key, value in _numbers(row).items():
            self._writer.add_scalar(key, value, global_step=step)

    def finish(self, ok: bool) -> None:
        self._writer.close()


class WandbRun:
    """One Weights & Biases run per run folder, resumed under the id kept in ``<run>/wandb_run_id``.

    Rows go without wandb's own step counter, which refuses to go back: ``step`` is their x axis instead.
    """

    def __init__(self, cfg: TrackerConfig) -> None:
        assert isinstance(cfg, WandbTracker)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._wandb = _need("wandb")
        self._cfg = cfg
        self._run: Any = None

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None:
        cfg = self._cfg
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
                project=cfg.project,
                entity=cfg.entity,
                tags=list(cfg.tags) or None,
                mode=cfg.mode.value,
                name=run_dir.resolve().name,
                id=_run_id(run_dir),
                resume="allow",
                dir=str(run_dir),
                config=dict(config),
                settings=settings,
            )
        except (self._wandb.Error, OSError) as error:
            line = " ".join(str(error).split())
            raise UserError(
                f"tracker=wandb did not start (tracker.mode={cfg.mode.value}): {line}; check the network and "
                "`wandb login`, or take tracker.mode=offline and upload with `wandb sync` later"
            ) from None
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Mapping[str, Any], step: int) -> None:
        self._run.log({**_numbers(row), "step": step})

    def finish(self, ok: bool) -> None:
        self._run.finish(exit_code=0 if ok else 1)


class _Guarded:
    """A tracker that may fail after its start: the first error is a warning, the rest is silence."""

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
        raise UserError(f"tracker={package} needs the package {package}: pip install 'moetrain[{package}]'")
    return module


def _run_id(run_dir: Path) -> str:
    """The id kept in the run folder; made and kept if there is none."""
    path = run_dir / WANDB_ID_FILE
    if path.exists() and (kept := path.read_text(encoding="utf-8").strip()):
        return kept
    run_id = secrets.token_hex(4)
    temporary = path.with_name(f".{WANDB_ID_FILE}.tmp")
    temporary.write_text(run_id + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return run_id


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numeric entries of a row; NaN stays (both services show it), None and text go."""
    return {k: float(v) for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
