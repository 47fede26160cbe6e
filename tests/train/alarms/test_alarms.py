"""Each alarm on figures made by hand, the watch over them, and what of it resumes."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import tiny

from moetrain.checkpoint.saved_state import SavedAlarms
from moetrain.files import parse_json
from moetrain.train.alarms import AlarmWatch, StepFigures
from moetrain.train.alarms.options import AlarmsConfig
from moetrain.train.alarms.watch import layers_named
from moetrain.train.log.jsonl import read_metrics

EVEN, ONE_OF_ALL = [13] * 11, [143] + [0] * 10
NONE = AlarmsConfig(
    collapse=None, dead_steps=None, entropy=None, logit_rms=None, imbalance_cost=None, loss_spike=None,
    throughput=None,
)  # fmt: skip


def watch(ranks: dict[int, list[range]] | None = None, share: float = 0.5, **options: Any) -> AlarmWatch:
    """A watch with the given alarms alone, which wait for three steps."""
    cfg = AlarmsConfig(**(vars(NONE) | {"patience": 3} | options))
    return AlarmWatch(cfg, lambda name: f"mend={name}", ranks or {}, share)


def step(
    number: int,
    demand: dict[int, list[int]] | None = None,
    computed: dict[int, list[int]] | None = None,
    tokens: int = 143,
    **row: float,
) -> StepFigures:
    demand = {2: EVEN} if demand is None else demand
    computed = demand if computed is None else computed
    rows: dict[str, float] = {"step": number, "train/loss": 5.0, "tokens_per_second": 100.0, "time": number}
    for layer, counts in computed.items():
        rows[f"moe/{layer}/experts_per_token"] = sum(counts) / tokens
        rows |= {f"moe/{layer}/{name}": row.pop(name) for name in ("entropy", "logit_rms") if name in row}
    rows |= {key.replace("__", "/"): value for key, value in row.items()}
    arrays = [{layer: np.array(counts) for layer, counts in which.items()} for which in (demand, computed)]
    return StepFigures(rows, *arrays)


def events(alarms: AlarmWatch, figures: list[StepFigures]) -> list[tuple[int, str, bool, tuple[int, ...]]]:
    found = [event for each in figures for event in alarms.observe(each)]
    return [(event.step, event.alarm, event.raised, event.layers) for event in found]


def test_a_collapse_is_raised_once_and_clears():
    bad = [step(n, {2: EVEN, 5: ONE_OF_ALL}) for n in range(1, 9)]
    good = [step(n, {2: EVEN, 5: EVEN}) for n in range(9, 14)]
    assert events(watch(collapse=0.1), bad + good) == [
        (3, "collapse", True, (5,)),
        (11, "collapse", False, (5,)),
    ]


def test_a_good_step_between_begins_the_count_anew():
    loads = [ONE_OF_ALL, ONE_OF_ALL, EVEN, ONE_OF_ALL, ONE_OF_ALL, EVEN]
    assert events(watch(collapse=0.1), [step(n, {2: load}) for n, load in enumerate(loads)]) == []


def test_a_collapse_behind_a_capacity_is_seen():
    """Of what all tokens want, one expert computes its capacity, and the rest is dropped."""
    kept = {2: [17] + [0] * 10}
    found = events(watch(collapse=0.1), [step(n, {2: ONE_OF_ALL}, kept) for n in range(4)])
    assert found == [(2, "collapse", True, (2,))]


@pytest.mark.parametrize(
    ("load", "per_token", "named"),
    [
        ([50, 50, 0, 0, 0, 0, 0], 2, True),  # all tokens want the same two of seven
        ([50, 50, 2, 2, 2, 2, 2], 2.2, False),  # 3.2 in use
        ([50, 50, 50, 0, 0, 0, 0], 3, False),  # more than a third: passed over
        ([100, 0, 0, 0, 0, 0, 0], 1, True),
        ([0] * 7, 0, False),  # no token at all
        ([77], 1, False),  # one expert cannot collapse
    ],
)
def test_what_counts_as_a_collapse(load, per_token, named):
    tokens = round(sum(load) / per_token) if per_token else 0
    figures = step(1, {0: load}, tokens=max(tokens, 1))
    assert bool(watch(collapse=0.1, patience=1).observe(figures)) == named


def test_a_dead_expert_is_one_that_stays_without_tokens():
    """Another expert in each step is none; the same one is, from its fifth step on, and until it has one."""
    others = [[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]] * 3
    same = [[1, 1, 0, 1]] * 7 + [[1, 1, 1, 1]] * 4
    figures = [step(n, {4: load}) for n, load in enumerate(others + same, start=1)]
    assert events(watch(dead_steps=5), figures) == [
        (17, "dead_experts", True, (4,)),
        (22, "dead_experts", False, (4,)),
    ]


def test_entropy_and_logits_are_held_to_their_limits():
    alarms = watch(entropy=0.01, logit_rms=30.0)
    low = 0.01 * math.log(11)
    healthy = [step(n, entropy=1.01 * low, logit_rms=29.9) for n in range(1, 5)]
    broken = [step(n, entropy=0.99 * low, logit_rms=30.1) for n in range(5, 9)]
    found = events(alarms, healthy + broken)
    assert found == [(7, "low_entropy", True, (2,)), (7, "large_logits", True, (2,))]


def test_the_cost_of_an_imbalance_over_ranks():
    """Two ranks; the busiest has 1.8 times the mean, and experts are half of a balanced step: 0.4 / 1.4."""
    ranks = {2: [range(2), range(2, 4)]}
    figures = step(1, {2: [45, 45, 5, 5]})
    (event,) = watch(ranks, share=0.5, imbalance_cost=0.28, patience=1).observe(figures)
    assert event.value == pytest.approx(0.4 / 1.4)
    assert event.layers == ()
    assert not watch(ranks, share=0.5, imbalance_cost=0.29, patience=1).observe(figures)
    assert not watch({}, imbalance_cost=0.0, patience=1).observe(figures)


def test_a_loss_spike_is_named_at_once():
    losses = [5.0] * 12 + [6.6, 5.0, 5.0, 5.0]
    found = events(watch(loss_spike=1.3), [step(n, train__loss=v) for n, v in enumerate(losses, start=1)])
    assert found == [(13, "loss_spike", True, ()), (16, "loss_spike", False, ())]


def test_a_loss_that_is_not_finite_is_a_spike():
    assert events(watch(loss_spike=1.3), [step(1, train__loss=math.nan)]) == [(1, "loss_spike", True, ())]


@pytest.mark.parametrize(("seconds", "named"), [(1.0, False), (13.0, True)])
def test_a_speed_that_stays_below_half_for_a_minute_is_named(seconds, named):
    rows = [step(n, tokens_per_second=100.0) for n in range(60)]
    rows += [step(60 + n, tokens_per_second=49.0, time=60 + n * seconds) for n in range(10)]
    found = events(watch(throughput=0.5), rows)
    assert found == ([(67, "throughput", True, ())] if named else [])


def test_alarms_of_many_layers_are_one_line():
    figures = [step(n, dict.fromkeys(range(64), ONE_OF_ALL)) for n in range(3)]
    alarms = watch(collapse=0.1)
    (event,) = [event for each in figures for event in alarms.observe(each)]
    assert event.layers == tuple(range(64))
    assert "in layers 0, 1, 2, 3 and 60 more: 1.0 of 11 experts are in use" in event.line()
    assert event.line().endswith("; may help: mend=collapse")
    assert "\n" not in event.line()


@pytest.mark.parametrize(("layers", "said"), [((3,), "layer 3"), ((1, 4), "layers 1, 4")])
def test_layers_by_name(layers, said):
    assert layers_named(layers) == said


def test_switched_off_nothing_is_said():
    alarms = watch(enabled=False, collapse=0.1, dead_steps=1)
    assert events(alarms, [step(n, {2: ONE_OF_ALL}) for n in range(9)]) == []
    assert alarms.state_dict() == {"places": {}, "idle": {}, "loss": None}


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_watch_that_resumes_says_what_another_says(cut):
    """At any step, by the JSON of a checkpoint; and a rollback says again what came after it."""
    loads = [EVEN] * 2 + [ONE_OF_ALL] * 9 + [EVEN] * 8 + [ONE_OF_ALL] * 5
    losses = [5.0] * 12 + [9.0] + [5.0] * 11
    figures = [
        step(n, {2: load, 7: EVEN}, train__loss=loss)
        for n, (load, loss) in enumerate(zip(loads, losses, strict=True), start=1)
    ]
    options = {"collapse": 0.1, "dead_steps": 6, "loss_spike": 1.3}
    straight, first, second = (watch(**options) for _ in range(3))
    whole = events(straight, figures)
    assert len(whole) == 7
    before = events(first, figures[:cut])
    saved = parse_json(json.dumps(first.state_dict()), SavedAlarms, "extra.json")
    second.load_state_dict(saved)
    assert before + events(second, figures[cut:]) == whole
    assert second.state_dict() == straight.state_dict()
    straight.load_state_dict(saved)
    assert events(straight, figures[cut:]) == whole[len(before) :]
    straight.load_state_dict(None)
    assert events(straight, figures) == whole


@pytest.mark.usefixtures("training")
def test_a_run_that_resumes_has_an_uninterrupted_runs_alarms(corpus, tmp_path):
    """Alarms without patience and limits that nothing meets: each step's are in the file once."""
    options = ["train.steps=9", "checkpoint.every=3", "checkpoint.keep_last=9", "alarms.dead_steps=2"]
    options += ["alarms.patience=2", "alarms.logit_rms=0", "alarms.collapse=1", "model.num_experts=7"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert tiny.train(corpus, whole, *options) == 0
    assert tiny.train(corpus, cut, *options, "train.steps=4", "resume_changes=[]") == 0
    assert tiny.train(corpus, cut, *options) == 0
    rows = read_metrics(whole / "alarms.jsonl")
    assert rows
    assert {row["alarm"] for row in rows} >= {"collapse", "large_logits"}
    assert read_metrics(cut / "alarms.jsonl") == rows
    tiny.assert_same_state(tiny.checkpoint(cut, 9), tiny.checkpoint(whole, 9))
