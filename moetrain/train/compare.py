"""``compare``: several variants of one config, each over all seeds, as a queue that can be interrupted.

A run that has a ``summary.json`` is done and is not repeated; an unfinished one is resumed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from moetrain.errors import UserError
from moetrain.files import MB, read_json
from moetrain.flat import keys_of
from moetrain.parallel.distributed import broadcast_object, init_from_env, is_main, shutdown
from moetrain.parallel.environment import stopped
from moetrain.parallel.watchdog.watchdog import backend_timeout, watching
from moetrain.terminal import tell
from moetrain.train.options import CompareConfig, TrainConfig
from moetrain.train.resume import check_start
from moetrain.train.run import resolve_device, run_path, train
from moetrain.train.run_files import ReadConfig
from moetrain.train.run_lock import owning
from moetrain.writing import write_atomic

Arms = Mapping[str, tuple[TrainConfig, Sequence[str]]]  # name -> a validated config, and its warnings


@dataclass(frozen=True)
class _Summary:
    steps: Annotated[int, Field(ge=0)]


def compare(cfg: TrainConfig, arms: Arms, read: ReadConfig) -> int:
    """Train every arm over every seed, then write the table and the figure; returns the exit code.

    Runs lie in ``<folder>/<arm>/seed_<n>``; the folder is ``run.dir`` or ``run.root/run.name``, and without
    either one is named by the time, so name it to be able to go on.
    """
    init_from_env(backend_timeout(cfg.parallel.timeout), resolve_device(cfg.train.device))
    try:
        with watching(cfg.parallel.timeout), owning(*run_path(cfg)) as lock:
            return _compare(cfg, arms, read, lock.folder)
    finally:
        shutdown()


def _compare(cfg: TrainConfig, arms: Arms, read: ReadConfig, folder: Path) -> int:
    runs = {name: [folder / name / f"seed_{seed}" for seed in cfg.compare.seeds] for name in arms}
    for name, (arm, _) in arms.items():
        for seed, run_dir in zip(cfg.compare.seeds, runs[name], strict=True):
            check_start(_one(arm, seed, run_dir), read, keys_of(cfg.compare.arms[name]))
    for seed in cfg.compare.seeds:  # arms inside seeds: an interrupted queue still compares like with like
        for name, (arm, notes) in arms.items():
            run_dir = folder / name / f"seed_{seed}"
            if _is_done(run_dir, arm.train.steps):
                _say(f"{run_dir} is done already")
                continue
            if not train(_one(arm, seed, run_dir), read, notes):
                _say(f"comparison stopped in {run_dir}; the same command with run.dir={folder} goes on")
                return stopped()
    if is_main():
        _write(folder, runs)
    return 0


def _write(folder: Path, runs: dict[str, list[Path]]) -> None:
    from moetrain.report import comparison_figure, comparison_table

    table = comparison_table(runs)
    write_atomic(folder / "comparison.md", table + "\n")
    tell(f"\n{table}\n")
    try:
        tell(f"figure: {comparison_figure(runs, folder / 'comparison.png')}")
    except UserError as error:
        tell(f"no figure: {error}")
    tell(f"table: {folder / 'comparison.md'}")


def _say(text: str) -> None:
    if is_main():
        tell(text)


def _one(arm: TrainConfig, seed: int, run_dir: Path) -> TrainConfig:
    run = replace(arm.run, dir=str(run_dir))
    return replace(arm, train=replace(arm.train, seed=seed), run=run, compare=CompareConfig(), resume="auto")


def _is_done(run_dir: Path, steps: int) -> bool:
    """Whether the run's summary says so: the answer of rank 0, which writes it, on every rank."""
    done = False
    if is_main() and (run_dir / "summary.json").exists():
        with contextlib.suppress(UserError):  # a damaged one: the run finds out what is left to do
            done = read_json(run_dir / "summary.json", _Summary, MB).steps >= steps
    return bool(broadcast_object(done))
