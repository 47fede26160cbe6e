"""Before a checkpoint is loaded: whether the command is still that of its run."""

from __future__ import annotations

from pathlib import Path

from moetrain.checkpoint.peers import Peers
from moetrain.checkpoint.read import run_of
from moetrain.config.resume import compare, stored_config
from moetrain.train.identity import compare_resumed
from moetrain.train.options import TrainConfig
from moetrain.train.run_files import CONFIG


def check_resume(cfg: TrainConfig, checkpoint: Path | None) -> list[str]:
    """What is to be said of what changed since ``checkpoint``; None: a run that starts anew. Collective.

    Writes nothing. Raises UserError, on every rank, for what may not change; see ``docs/resume.md``.
    """
    if checkpoint is None:
        names = ",".join(cfg.resume_changes)
        return [f"resume_changes=[{names}] has no effect: this run starts anew"] if names else []
    return Peers().from_first(lambda: _check(cfg, checkpoint))


def _check(cfg: TrainConfig, checkpoint: Path) -> list[str]:
    folder = run_of(checkpoint)
    before = stored_config(folder)
    if before is None:
        lines = [f"there is no {folder / CONFIG}: whether this command is that run's was not compared"]
    else:
        lines = compare(before, cfg, str(folder))
    return lines + compare_resumed(cfg, checkpoint)
