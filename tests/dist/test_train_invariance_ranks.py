"""A step is a function of its batch on any number of ranks, in any layout: see test_train_invariance.py."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from invariance import (
    FORMS,
    B,
    Outcome,
    Recorder,
    assert_same,
    build,
    gradients,
    terms,
    weights_after_three_steps,
)

from moetrain.parallel.mesh import Meshes, build_meshes
from moetrain.parallel.options import ParallelConfig
from moetrain.parallel.ranks import run_ranks
from moetrain.train.engine import NativeEngine
from moetrain.train.log.monitor import LossMonitor
from moetrain.train.step import TrainStep

SCOPES = ("sequence", "global_batch", "running")
CASES = [(form, scope) for form in FORMS for scope in SCOPES]
LAYOUTS = {
    "2 ranks, sharded": (2, ParallelConfig(), 2),
    "2 ranks, replicated": (2, ParallelConfig(dp_replicate=2), 1),
    "4 ranks, sharded": (4, ParallelConfig(), 1),
    "4 ranks, both": (4, ParallelConfig(dp_replicate=2), 2),
}


@cache
def on_one_rank() -> tuple[list[Outcome], Outcome]:
    return [gradients(terms(form, scope), B) for form, scope in CASES], weights_after_three_steps(B)


def _steps(rank: int, world: int, layout: ParallelConfig, micro: int) -> tuple[list[Outcome], Outcome]:
    meshes = build_meshes(layout, world)
    found = []
    for number, (form, scope) in enumerate(CASES):
        recompute = number % 2 == 1
        found.append(gradients(terms(form, scope), micro, recompute, rank, world, meshes))
    return found, weights_after_three_steps(micro, False, rank, world, meshes)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (LAYOUTS[name][0] > 2)) for name in LAYOUTS]
)
def test_no_gradient_and_no_update_depends_on_the_ranks(name):
    world, layout, micro = LAYOUTS[name]
    results = run_ranks(_steps, world, layout, micro, timeout=200)
    expected, weights_expected = on_one_rank()
    for found, weights in results:
        for one, other in zip(expected, found, strict=True):
            assert_same(one, other)
        assert_same(weights_expected, weights)


def _first_of_all(rank: int, world: int) -> str | None:
    task = build(False, build_meshes(ParallelConfig(), world))
    engine = NativeEngine(task, Recorder(list(task.parameters())))
    step = TrainStep(engine, [], [], LossMonitor(), None, seed=2)
    tensors = [torch.zeros(3) for _ in task.parameters()]
    for index in (5, 9) if rank == 1 else (7,):
        tensors[index][1] = math.nan
    return step._first_not_finite([None, *tensors[1:]])


def test_all_ranks_name_the_same_parameter():
    """Each looks at its own shards, and only rank 0 speaks."""
    names = [name.removeprefix("model.") for name, _ in build(False, Meshes()).named_parameters()]
    assert run_ranks(_first_of_all, 2) == [names[5]] * 2
