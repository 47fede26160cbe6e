"""Runs in which experts compete: resumed and recomputed bit for bit, over any micro-batches, and sampled."""

from __future__ import annotations

import pytest
import tiny

from moetrain.cli import main

pytestmark = [pytest.mark.usefixtures("training"), pytest.mark.real]

HALF = ["router.rate=0.5", "router.warmup_steps=1", "train.eval_every=3", "checkpoint.every=1"]
HALF += ["checkpoint.keep_last=9"]


@pytest.mark.parametrize("name", ["competesmoe", "competesmoe_v1"])
def test_a_run_with_competitions_resumes_bit_for_bit(name, corpus, tmp_path):
    runs = [tmp_path / "whole", tmp_path / "halves", tmp_path / "recomputed"]
    options = [f"router={name}", *HALF]
    assert tiny.train(corpus, runs[0], *options, "train.steps=5") == 0
    for steps in (3, 5):
        assert tiny.train(corpus, runs[1], *options, f"train.steps={steps}") == 0
    assert tiny.train(corpus, runs[2], *options, "train.steps=5", "train.recompute=true") == 0
    for other in runs[1:]:
        assert tiny.steps(other) == tiny.steps(runs[0])
        assert tiny.evaluations(other) == tiny.evaluations(runs[0])
        tiny.assert_same_state(tiny.checkpoint(other, 5), tiny.checkpoint(runs[0], 5))
    penalties = [row["moe/0/aux/penalty"] for row in tiny.steps(runs[0])]
    assert penalties[0] == 0  # the warm-up
    assert len({penalty != 0 for penalty in penalties[1:]}) == 2  # it competes in some steps
    assert main(["generate", f"checkpoint={runs[0]}", "prompt=abc", "max_new_tokens=3"]) == 0


def test_micro_batches_change_nothing(corpus, tmp_path):
    runs = [tmp_path / "two", tmp_path / "four"]
    options = ["router=competesmoe", "router.rate=1", "router.warmup_steps=0", "train.precision=fp64"]
    for run, micro in zip(runs, (2, 4), strict=True):
        assert tiny.train(corpus, run, *options, "train.steps=3", f"train.micro_batch_size={micro}") == 0
    for one, other in zip(*map(tiny.steps, runs), strict=True):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-12)
