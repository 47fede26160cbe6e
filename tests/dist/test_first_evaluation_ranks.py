"""``train.eval_first`` on ranks: the loss of one process, and a run that is otherwise the same to the bit."""

from __future__ import annotations

import pytest
import tiny
from lives import Lives

FEW = ["train.steps=2", "train.eval_every=0", "checkpoint.every=2", "train.micro_batch_size=1"]
EXPERTS = "model.num_experts=6"
DEEPSPEED = "engine=deepspeed"
LAYOUTS = {  # ranks, and what lays them out
    "ep=2": (2, ["parallel.ep=2"]),
    "zero_stage=3": (2, [DEEPSPEED, "engine.zero_stage=3"]),
    "zero_stage=1": (2, [DEEPSPEED, "engine.zero_stage=1", "parallel.ep=2"]),
    "hsdp": (4, ["parallel=hsdp", "parallel.ep=2"]),
}
MARKS = {"zero_stage=3": pytest.mark.real}  # spread experts: test_chat_mixture_training.py


@pytest.mark.parametrize("layout", [pytest.param(k, marks=MARKS.get(k, pytest.mark.slow)) for k in LAYOUTS])
def test_only_the_evaluation_is_added(layout, corpus, tmp_path):
    world, options = LAYOUTS[layout]
    if DEEPSPEED in options:
        pytest.importorskip("deepspeed")
    for name, more in (("first", ["train.eval_first=true"]), ("without", [])):
        command = tiny.command(corpus, tmp_path / name, *FEW, EXPERTS, *options, *more)
        with Lives([command] * world, tmp_path) as lives:
            assert lives.codes() == [0] * world, lives.output(0)
    first, without = tmp_path / "first", tmp_path / "without"
    assert tiny.steps(first) == tiny.steps(without)
    assert tiny.evaluations(first)[1:] == tiny.evaluations(without)
    tiny.assert_same_state(tiny.checkpoint(first, 2), tiny.checkpoint(without, 2))
    start = tiny.evaluations(first)[0]
    assert (start["step"], start["tokens"]) == (0, 0)
    with tiny.alone():
        assert tiny.train(corpus, tmp_path / "alone", *FEW, EXPERTS, "train.eval_first=true") == 0
    assert start["val/loss"] == pytest.approx(tiny.evaluations(tmp_path / "alone")[0]["val/loss"], abs=1e-5)
