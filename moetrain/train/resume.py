"""Before a checkpoint is loaded: whether the command is still that of its run.

``read`` reads the file of a stored config; see :data:`moetrain.train.run_files.ReadConfig`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from moetrain.checkpoint.peers import Peers
from moetrain.checkpoint.read import CHECKPOINTS, run_of, steps_in
from moetrain.errors import UserError
from moetrain.train.changes import compare
from moetrain.train.identity import compare_resumed
from moetrain.train.options import TrainConfig
from moetrain.train.run_files import CONFIG, ReadConfig


def check_resume(cfg: TrainConfig, checkpoint: Path | None, read: ReadConfig) -> list[str]:
    """What is to be said of what changed since ``checkpoint``; None: a run that starts anew. Collective.

    Writes nothing. Raises UserError, on every rank, for what may not change; see ``docs/resume.md``.
    """
    if checkpoint is None:
        names = ",".join(cfg.resume_changes)
        return [f"resume_changes=[{names}] has no effect: this run starts anew"] if names else []
    return Peers().from_first(lambda: _check(cfg, checkpoint, read))


def stored_config(folder: Path, read: ReadConfig) -> TrainConfig | None:
    """The config in a run folder; None where it has none. UserError where it cannot be read."""
    file = folder / CONFIG
    if not file.exists():
        return None
    try:
        return read(file)
    except UserError as error:
        raise UserError(
            f"resume: {error}; without it nobody can say whether this command is that run's: restore the "
            "file, or remove it to resume without comparing"
        ) from error


def resumed_folder(cfg: TrainConfig) -> Path | None:
    """The run folder whose checkpoint ``cfg`` would resume from; None for a run that starts anew."""
    if cfg.resume == "none":
        return None
    if cfg.resume != "auto":
        path = Path(cfg.resume)
        return path if (path / CHECKPOINTS).is_dir() else run_of(path)
    folder = run_folder(cfg)
    return folder if folder is not None and steps_in(folder / CHECKPOINTS) else None


def run_folder(cfg: TrainConfig) -> Path | None:
    """The run's folder; None where the clock will name it."""
    if cfg.run.dir is not None:
        return Path(cfg.run.dir)
    return None if cfg.run.name is None else Path(cfg.run.root) / cfg.run.name


def check_start(cfg: TrainConfig, read: ReadConfig, strict: Collection[str] = ()) -> None:
    """One of several runs, before the first of them begins. UserError where it could not start or resume."""
    folder = resumed_folder(cfg)
    if folder is None:
        require_source(cfg.init_from)
    elif (before := stored_config(folder, read)) is not None:
        compare(before, cfg, str(folder), strict)


def require_source(init_from: str | None) -> None:
    """UserError where a run that starts anew has no folder to start from."""
    if init_from is not None and not Path(init_from).expanduser().is_dir():
        raise UserError(f"init_from={init_from} does not exist, and there is no checkpoint to resume from")


def _check(cfg: TrainConfig, checkpoint: Path, read: ReadConfig) -> list[str]:
    folder = run_of(checkpoint)
    before = stored_config(folder, read)
    if before is None:
        lines = [f"there is no {folder / CONFIG}: whether this command is that run's was not compared"]
    else:
        lines = compare(before, cfg, str(folder))
    return lines + compare_resumed(cfg, checkpoint)
