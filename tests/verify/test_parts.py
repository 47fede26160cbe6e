"""Ranks' parts of a quantity against the whole of it: what is off, missing or not held by anybody is told."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moetrain.config.hydra.compose import compose_train
from moetrain.parallel.options import ParallelConfig
from moetrain.verify.compare import compare, replicas
from moetrain.verify.part import Part, part_of
from moetrain.verify.twin import twin_of

NAME = "weight: w_ED"
WHOLE = torch.arange(35, dtype=torch.float64).reshape(7, 5)


def rows(first: int, last: int, value: torch.Tensor = WHOLE, offset: int | None = None) -> Part:
    return Part(value[first:last].clone(), (7, 5), (first if offset is None else offset, 0))


def held(*parts: Part | None):
    return [{"3 steps": {} if part is None else {NAME: part}} for part in parts]


def compared(*parts: Part | None):
    (check,) = compare({"3 steps": {NAME: part_of(WHOLE)}}, held(*parts), 1e-9)
    return check


@pytest.mark.parametrize(
    "parts",
    [
        (part_of(WHOLE), part_of(WHOLE)),
        (rows(0, 4), rows(4, 7)),
        (rows(0, 4), rows(4, 7), rows(7, 7)),  # more ranks than rows
        (rows(0, 4), rows(4, 7), rows(0, 4), rows(4, 7)),  # twice
        (Part(WHOLE[:, :2], (7, 5), (0, 0)), Part(WHOLE[:, 2:], (7, 5), (0, 2))),
    ],
)
def test_parts_that_are_right_are_equal(parts):
    check = compared(*parts)
    assert (check.holds, check.number, check.worst) == (True, 1, 0.0)


@pytest.mark.parametrize(
    "parts",
    [
        (rows(0, 4), rows(4, 6)),  # nobody holds the last row
        (rows(0, 4), rows(0, 4)),
        (rows(0, 4), rows(3, 7)),  # one row twice, by parts that are not the same
        (rows(0, 4), None),
        (None, None),
        (rows(0, 4), Part(WHOLE[4:, :4], (7, 4), (4, 0))),  # of another shape
        (rows(0, 4), Part(WHOLE[4:].float(), (7, 5), (4, 0))),  # or dtype
    ],
)
def test_parts_that_are_not_all_of_it_are_no_proof(parts):
    check = compared(*parts)
    assert (check.holds, check.worst) == (False, math.inf)


def test_a_part_that_is_off_or_elsewhere_is_told():
    off = WHOLE + 1e-6 * (torch.arange(7) == 5)[:, None]
    check = compared(rows(0, 4), rows(4, 7, off))
    assert (check.holds, check.where) == (False, "w_ED on rank 1")
    assert check.worst == pytest.approx(1e-6 / 34, rel=1e-3)
    assert not compared(rows(0, 3, offset=4), rows(3, 7, offset=0)).holds


def test_ranks_that_hold_the_same_part_hold_the_same_bits():
    other = WHOLE.nextafter(torch.tensor(99.0))
    after = "3 steps"
    assert replicas(held(rows(0, 4), rows(4, 7), rows(0, 4), rows(4, 7)), after).holds
    check = replicas(held(rows(0, 4), rows(4, 7), rows(0, 4), rows(4, 7, other)), after)
    assert (check.holds, check.number, check.where) == (False, 1, "w_ED on rank 3")
    assert not replicas(held(rows(0, 4), None), after).holds


def test_one_process_is_measured_without_a_layout():
    """So that layouts of one number of ranks share what it finds; other batches or another model do not."""

    cfg = compose_train([])

    def of(world: int, **changes):
        return twin_of(replace(cfg, **changes), world, 8).reference()

    layouts = [{}, {"ep": 4}, {"ep": 2, "overlap": 2}, {"ep": 2, "dp_replicate": 2}]
    alike = [of(4, parallel=ParallelConfig(**layout)) for layout in layouts]
    assert all(twin == alike[0] for twin in alike)
    assert of(2) != alike[0] != of(4, router=replace(cfg.router, top_k=1))
    # one process turns it on where the ranks have it off
    assert of(4, train=replace(cfg.train, recompute=True)) != alike[0]
