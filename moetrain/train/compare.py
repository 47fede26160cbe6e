"""``compare``: several variants of one config, each over all seeds, as a queue that can be interrupted.

A run that has a ``summary.json`` is done and is not repeated; an unfinished one is resumed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from moetrain.config.schema import CompareConfig, TrainConfig
from moetrain.errors import UserError
from moetrain.train.run import run_path, train


def compare(cfg: TrainConfig, arms: dict[str, TrainConfig]) -> int:
    """Train every arm over every seed, then write the table and the figure; returns the exit code.

    Runs lie in ``<folder>/<arm>/seed_<n>``; the folder is ``run.dir`` or ``run.root/run.name``, and without
    either one is named by the time, so name it to be able to go on.
    """
    from moetrain.report import comparison_figure, comparison_table

    folder = run_path(cfg)
    runs = {name: [folder / name / f"seed_{seed}" for seed in cfg.compare.seeds] for name in arms}
    for seed in cfg.compare.seeds:  # arms inside seeds: an interrupted queue still compares like with like
        for name, arm in arms.items():
            run_dir = folder / name / f"seed_{seed}"
            if _is_done(run_dir, arm.train.steps):
                print(f"{run_dir} is done already")
                continue
            code = train(_one(arm, seed, run_dir))
            if code or not _is_done(run_dir, arm.train.steps):
                print(f"comparison stopped in {run_dir}; the same command with run.dir={folder} goes on")
                return code
    table = comparison_table(runs)
    (folder / "comparison.md").write_text(table + "\n")
    print(f"\n{table}\n")
    try:
        print(f"figure: {comparison_figure(runs, folder / 'comparison.png')}")
    except UserError as error:
        print(f"no figure: {error}")
    print(f"table: {folder / 'comparison.md'}")
    return 0


def _one(arm: TrainConfig, seed: int, run_dir: Path) -> TrainConfig:
    run = replace(arm.run, dir=str(run_dir))
    return replace(arm, train=replace(arm.train, seed=seed), run=run, compare=CompareConfig(), resume="auto")


def _is_done(run_dir: Path, steps: int) -> bool:
    try:
        return int(json.loads((run_dir / "summary.json").read_text())["steps"]) >= steps
    except (OSError, ValueError, KeyError):
        return False
