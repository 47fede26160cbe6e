"""lr_factor: worked values, and what holds for every schedule."""

import dataclasses
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.errors import UserError
from moetrain.train.optim.options import ScheduleConfig, ScheduleKind
from moetrain.train.optim.schedule import lr_factor

DECAYING = [ScheduleKind.cosine, ScheduleKind.wsd]


@st.composite
def schedules(draw: st.DrawFn) -> ScheduleConfig:
    horizon = draw(st.integers(1, 300))
    return ScheduleConfig(
        kind=draw(st.sampled_from(ScheduleKind)),
        horizon=horizon,
        warmup_steps=draw(st.integers(0, horizon)),
        decay_fraction=draw(st.floats(0, 1, exclude_min=True)),
        min_ratio=draw(st.floats(0, 1)),
    )


def test_warmup_starts_above_zero_and_ends_at_the_peak():
    cfg = ScheduleConfig(warmup_steps=5, horizon=50)
    assert [lr_factor(cfg, step) for step in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_cosine_passes_its_midpoint_and_ends_at_the_minimum():
    cfg = ScheduleConfig(kind=ScheduleKind.cosine, warmup_steps=10, horizon=30, min_ratio=0.1)
    assert lr_factor(cfg, 10) == 1.0
    assert lr_factor(cfg, 20) == pytest.approx(0.55)
    assert lr_factor(cfg, 15) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert lr_factor(cfg, 30) == 0.1


def test_wsd_is_flat_then_straight():
    cfg = ScheduleConfig(
        kind=ScheduleKind.wsd, warmup_steps=10, horizon=100, decay_fraction=0.2, min_ratio=0.0
    )
    assert [lr_factor(cfg, step) for step in (10, 50, 80)] == [1.0, 1.0, 1.0]
    assert [lr_factor(cfg, step) for step in (85, 90, 95, 100)] == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_constant_stays_at_the_peak_beyond_the_horizon():
    cfg = ScheduleConfig(kind=ScheduleKind.constant, warmup_steps=3, horizon=10)
    assert {lr_factor(cfg, step) for step in (2, 5, 10, 10_000)} == {1.0}


@given(schedules(), st.integers(0, 400))
def test_every_factor_lies_between_zero_and_one(cfg, step):
    assert 0 <= lr_factor(cfg, step) <= 1


@given(schedules())
def test_it_rises_through_the_warmup_and_never_afterwards(cfg):
    factors = [lr_factor(cfg, step) for step in range(cfg.horizon + 5)]
    warm, rest = factors[: cfg.warmup_steps], factors[max(0, cfg.warmup_steps - 1) :]
    assert all(earlier < later for earlier, later in pairwise(warm))
    assert all(earlier >= later - 1e-12 for earlier, later in pairwise(rest))


@given(schedules(), st.integers(0, 10_000))
def test_after_the_horizon_nothing_changes(cfg, beyond):
    expected = 1.0 if cfg.kind is ScheduleKind.constant else cfg.min_ratio
    assert lr_factor(cfg, cfg.horizon + beyond) == expected


@pytest.mark.parametrize("kind", DECAYING)
def test_the_last_step_before_the_horizon_is_above_the_minimum(kind):
    cfg = ScheduleConfig(kind=kind, warmup_steps=0, horizon=40, min_ratio=0.1)
    assert lr_factor(cfg, 39) > 0.1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"horizon": 0}, "schedule.horizon=0"),
        ({"warmup_steps": -1}, "schedule.warmup_steps=-1"),
        ({"warmup_steps": 401}, "schedule.warmup_steps=401 exceeds schedule.horizon=400"),
        ({"min_ratio": 1.5}, "schedule.min_ratio=1.5"),
        ({"decay_fraction": -0.1}, "schedule.decay_fraction=-0.1"),
    ],
)
def test_an_impossible_schedule_names_its_key(changes, named):
    with pytest.raises(UserError, match=named):
        lr_factor(dataclasses.replace(ScheduleConfig(), **changes), 0)


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="-1"):
        lr_factor(ScheduleConfig(), -1)
