"""Every router through the whole trainer, from its yaml: train, save, resume, evaluate, generate."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest
import tiny

import moetrain
from moetrain.cli import main
from moetrain.config.hydra.store import CONFIG_DIR
from moetrain.moe import ROUTERS

pytestmark = pytest.mark.usefixtures("training")

NAMES = sorted(ROUTERS)
# One of each kind.
DIFFERENT = ("base", "expert_choice", "moepp", "relu", "sparsemixer2", "topk")
THREE = ["train.steps=3", "checkpoint.every=1", "checkpoint.keep_last=9", "train.eval_every=3"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.real] * (name not in DIFFERENT)) for name in NAMES]
)
def test_trains_resumes_bit_for_bit_evaluates_and_generates(name, corpus, tmp_path, capsys):
    run, copy = tmp_path / "run", tmp_path / "copy"
    options = [f"router={name}", *THREE]
    assert tiny.train(corpus, run, *options) == 0
    said = capsys.readouterr().out
    assert ("is not causal" in said) == (not ROUTERS[name].cls.causal)
    shutil.copytree(run, copy)
    for step in (2, 3):
        shutil.rmtree(tiny.checkpoint(copy, step))
    assert tiny.train(corpus, copy, *options) == 0
    assert tiny.steps(copy) == tiny.steps(run)
    assert tiny.evaluations(copy) == tiny.evaluations(run)
    tiny.assert_same_state(tiny.checkpoint(copy, 3), tiny.checkpoint(run, 3))
    (evaluation,) = tiny.evaluations(run)
    assert math.isfinite(evaluation["val/loss"])
    modes = ROUTERS[name].cls.eval_modes[1:]
    assert {f"val/loss_{mode}" for mode in modes} == {k for k in evaluation if k.startswith("val/loss_")}
    assert main(["generate", f"checkpoint={run}", "prompt=abc", "max_new_tokens=3"]) == 0


@pytest.mark.real
def test_a_search_for_an_order_resumes_bit_for_bit_over_its_end(corpus, tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    options = ["router=topk", "balance=penalty", "router.permutation_steps=2", *THREE]
    assert tiny.train(corpus, run, *options) == 0
    shutil.copytree(run, copy)
    for step in (2, 3):
        shutil.rmtree(tiny.checkpoint(copy, step))
    assert tiny.train(corpus, copy, *options) == 0
    assert tiny.steps(copy) == tiny.steps(run)
    tiny.assert_same_state(tiny.checkpoint(copy, 3), tiny.checkpoint(run, 3))
    assert main(["generate", f"checkpoint={run}", "prompt=abc", "max_new_tokens=3"]) == 0


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in DIFFERENT)) for name in NAMES]
)
def test_recompute_changes_no_bit(name, corpus, tmp_path):
    runs = [tmp_path / "plain", tmp_path / "recomputed"]
    for run, recompute in zip(runs, ("false", "true"), strict=True):
        options = [f"router={name}", "train.steps=2", f"train.recompute={recompute}"]
        assert tiny.train(corpus, run, *options) == 0
    assert tiny.steps(runs[0]) == tiny.steps(runs[1])
    tensors, _ = tiny.contents(tiny.checkpoint(runs[0], 2))
    others, _ = tiny.contents(tiny.checkpoint(runs[1], 2))
    assert not [key for key, tensor in tensors.items() if not tensor.equal(others[key])]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_hundred_steps(name, corpus, tmp_path):
    """The loss falls, and no router ends in a collapse that a number shows."""
    run = tmp_path / "run"
    options = [f"router={name}", "train.steps=200", "schedule.horizon=200", "train.eval_every=100"]
    assert tiny.train(corpus, run, *options) == 0
    first, last = tiny.evaluations(run)
    assert last["val/loss"] < first["val/loss"] < math.log(257)


def test_every_router_has_a_yaml_of_its_own():
    for name in NAMES:
        text = (CONFIG_DIR / "router" / f"{name}.yaml").read_text()
        assert f"  - _{name}\n" in text
        assert ROUTERS[name].paper
        assert ROUTERS[name].returns


def test_nothing_asks_for_a_router_by_name():
    """A router's behaviour lives in its own file: nothing else compares its name."""
    names = "|".join(map(re.escape, NAMES))
    pattern = re.compile(
        rf"router(\.name)?\s*(==|!=|in\b|is\b)\s*[(\[{{]?\s*[\"']({names})[\"']|case\s+[\"']({names})[\"']"
    )
    package = Path(moetrain.__file__).parent
    found = [
        str(file)
        for file in package.rglob("*.py")
        if file.parent.name != "routers" and pattern.search(file.read_text())
    ]
    assert not found


def test_evaluation_changes_no_state_of_a_router(corpus, tmp_path):
    """With one evaluation a step, or none: the same run."""
    runs = [tmp_path / "often", tmp_path / "never"]
    for run, every in zip(runs, (1, 0), strict=True):
        options = ["router=expert_choice", "train.steps=3", f"train.eval_every={every}"]
        assert tiny.train(corpus, run, *options) == 0
    assert tiny.steps(runs[0]) == tiny.steps(runs[1])
    tensors, _ = tiny.contents(tiny.checkpoint(runs[0], 3))
    others, _ = tiny.contents(tiny.checkpoint(runs[1], 3))
    learnt = [
        tensor for key, tensor in tensors.items() if key.endswith("blocks.0.feed_forward.router.threshold_E")
    ]
    assert [tensor.unique().numel() for tensor in learnt] == [5]  # no longer what it began with
    assert not [key for key, tensor in tensors.items() if not tensor.equal(others[key])]
