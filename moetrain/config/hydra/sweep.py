"""``moetrain train -m``: every job checked first, then run by Hydra's sweeper, each in its own folder."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from moetrain.config.explain import explain
from moetrain.config.hydra.compose import compose_train, from_node, load_yaml, prepare
from moetrain.config.hydra.overrides import is_sweep
from moetrain.config.init_from import source_overrides
from moetrain.config.pages import hydra_main
from moetrain.config.validate import validate
from moetrain.errors import UserError
from moetrain.flat import keys_of
from moetrain.parallel.environment import is_rank_0, stopped, world_size
from moetrain.terminal import tell
from moetrain.train.options import RunConfig, TrainConfig

_NOTE = "multirun.yaml"  # Hydra's


class SweepStoppedError(BaseException):
    """A job was asked to stop and has saved: the jobs after it are not begun.

    No Exception, which Hydra would keep for the end of the sweep.
    """


def sweep(flags: argparse.Namespace) -> int:
    """Run every combination; returns the exit code. Raises UserError before any job if one is wrong."""
    if any(o.startswith("init_from=") and is_sweep(o) for o in flags.overrides):
        raise UserError(
            "-m: init_from decides the model and cannot be swept: take compare.arms, or a command for each"
        )
    overrides = _overrides(flags)
    run = _check_jobs(flags, _jobs(overrides))
    folder = run.dir or run.root
    if run.dir is None and run.name is None:
        if world_size() > 1:
            raise UserError(
                "-m with several ranks needs run.name or run.dir: all ranks must agree on the folders"
            )
        overrides.append(f"run.name={time.strftime('%Y-%m-%d_%H-%M-%S')}")
    quoted = "'" + folder.replace("'", r"\'") + "'"
    places = [f"hydra.sweep.dir={quoted}", f"hydra.run.dir={quoted}"]
    try:
        with _unused_removed(Path(folder)):
            return hydra_main(flags, ["--multirun"], [*places, *overrides], train_job)
    except SweepStoppedError as e:
        if is_rank_0():
            tell(f"moetrain: {e}")
        return stopped()


def sweep_jobs(flags: argparse.Namespace) -> list[list[str]]:
    """The overrides of each job of a sweep, in the order in which it numbers them."""
    return _jobs(_overrides(flags))


def _overrides(flags: argparse.Namespace) -> list[str]:
    source = source_overrides(TrainConfig, flags.overrides, flags.config_name, flags.config_dir)
    return prepare(TrainConfig, [*source, *flags.overrides], flags.config_dir, sweep=True)


@contextlib.contextmanager
def _unused_removed(folder: Path) -> Iterator[None]:
    """Where no job wrote anything, leave no folder that the sweep made for Hydra's own note of it."""
    from moetrain.train.run_dir import missing, remove_empty

    made = missing(folder)
    try:
        yield
    except UserError:
        if made and is_rank_0() and folder.is_dir() and os.listdir(folder) == [_NOTE]:
            (folder / _NOTE).unlink()
            remove_empty(made)
        raise


def train_job(node: DictConfig) -> int:
    """One job of a sweep, called by Hydra's launcher, perhaps in another process."""
    num = HydraConfig.get().job.num
    from moetrain.train.run import train

    whole = from_node(TrainConfig, node)
    cfg = dataclasses.replace(whole, run=job_run(whole.run, num))
    if is_rank_0():
        tell(f"moetrain: job {num}: {' '.join(HydraConfig.get().overrides.task)}")
    try:
        finished = train(cfg, load_yaml, validate(cfg, world_size()))
    except UserError as e:
        raise type(e)(f"job {num}: {e}") from e
    if not finished:
        run = whole.run
        again = f"run.name={run.name}" if run.dir is None else f"run.dir={run.dir}"
        raise SweepStoppedError(f"the sweep stopped in job {num}; the same command with {again} goes on")
    return 0


def job_run(run: RunConfig, num: int) -> RunConfig:
    """The run folder of job ``num``: below ``run.dir`` where it is given, else beside it by name."""
    if run.dir is not None:
        return dataclasses.replace(run, dir=os.path.join(run.dir, f"job{num}"))
    return dataclasses.replace(run, name=f"{run.name}_job{num}")


def _check_jobs(flags: argparse.Namespace, jobs: list[list[str]]) -> RunConfig:
    """Compose and validate every job, and compare it with what its folder holds of an earlier sweep.

    A job is named by its number, so what is swept must be what it was. Returns the first's ``run`` section.
    """
    from moetrain.train.resume import check_start

    first, swept = None, keys_of([o for o in flags.overrides if is_sweep(o)])
    numbered = not any(o.startswith("hydra/sweeper=") for o in flags.overrides)  # else values come as it goes
    for i, job in enumerate(jobs):
        cfg = compose_train(job, flags.config_name, flags.config_dir)
        try:
            validate(cfg, world_size())
            if numbered and (cfg.run.dir is not None or cfg.run.name is not None):
                check_start(dataclasses.replace(cfg, run=job_run(cfg.run, i)), load_yaml, swept)
        except UserError as e:
            raise UserError(f"job {i} ({' '.join(job)}): {e}") from e
        if cfg.compare.arms:
            raise UserError("-m: a comparison is no sweep; leave out -m or compare.arms")
        first = first or cfg.run
    if first is None:
        raise UserError(f"-m {' '.join(flags.overrides)}: there is no job; a choice is empty")
    return first


def _jobs(overrides: list[str]) -> list[list[str]]:
    """The combinations that Hydra's basic sweeper makes; another sweeper's choices are its own affair."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as e:
        raise explain(e, [], lambda _: OmegaConf.create()) from e
    choices = []
    for o in parsed:
        key = o.get_key_element()
        if o.is_discrete_sweep():
            choices.append([f"{key}={value}" for value in o.sweep_string_iterator()])
        elif not o.is_sweep_override():
            choices.append([o.input_line or ""])
        elif not any(line.startswith("hydra/sweeper=") for line in overrides):
            raise UserError(f"{o.input_line}: a sweep takes values (a,b), choice() or range()")
    return [list(combination) for combination in itertools.product(*choices)]
