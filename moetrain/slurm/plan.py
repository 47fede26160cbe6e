"""``python -m moetrain.slurm.plan``: what a job is to run, composed and checked, as one line of JSON.

A sweep (``-m``) is a job array: each of its tasks runs one of the jobs that ``moetrain train -m`` would run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from moetrain.config.checked import checked
from moetrain.config.hydra.flags import parse_flags
from moetrain.config.hydra.sweep import job_run, sweep_jobs
from moetrain.errors import UserError
from moetrain.plain import plain
from moetrain.terminal import one_line, show, tell
from moetrain.train.options import RunConfig
from moetrain.train.resume import run_folder


@dataclasses.dataclass(frozen=True)
class Plan:
    """The arguments of ``moetrain train``, its run folder, and how many such jobs a sweep has."""

    arguments: list[str]
    folder: str
    jobs: int


def plan(arguments: Sequence[str], ranks: int, name: str, task: int = 0) -> Plan:
    """Compose and validate ``moetrain train <arguments>`` for ``ranks`` ranks; of a sweep its job ``task``.

    Without run.name and run.dir the run is called ``name``, which a requeue does not change. UserError where
    something is wrong.
    """
    flags = parse_flags("train", list(arguments))
    if flags.page:
        raise UserError(f"{flags.page[0]} prints a page and trains nothing: run it without Slurm")
    files = (flags.config_name, flags.config_dir)
    jobs = sweep_jobs(flags) if flags.multirun else [flags.overrides]
    if not 0 <= task < len(jobs):
        raise UserError(
            f"task {task} of the job array: -m makes {len(jobs)} jobs; submit --array=0-{len(jobs) - 1}"
        )
    cfg, _ = checked(jobs[task], ranks, *files)
    if cfg.compare.arms:
        raise UserError("a comparison runs its arms in one process after another: start it without Slurm")
    run = cfg.run if run_folder(cfg) is not None else dataclasses.replace(cfg.run, name=name)
    if flags.multirun:
        run = job_run(run, task)
    named = dataclasses.replace(cfg, run=run)
    folder = run_folder(named)
    assert folder is not None
    return Plan([*_file_flags(*files), *jobs[task], *_place(run)], str(folder), len(jobs))


def _place(run: RunConfig) -> list[str]:
    return [f"run.name={run.name}"] if run.dir is None else [f"run.dir={run.dir}"]


def _file_flags(config_name: str, config_dir: str | None) -> list[str]:
    return [f"--config-name={config_name}"] + ([f"--config-dir={config_dir}"] if config_dir else [])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; 2 and one line on standard error for a config that is wrong."""
    parser = argparse.ArgumentParser(prog="moetrain.slurm.plan", allow_abbrev=False)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--task", type=int, default=0)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    arguments = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    try:
        found = plan(arguments, options.ranks, options.name, options.task)
    except UserError as error:
        tell(f"moetrain: error: {one_line(str(error))}", sys.stderr)
        return error.exit_code
    show(json.dumps(plain(found) | {"folder": str(Path(found.folder).absolute())}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
