"""What a router freezes at a step no optimizer moves or decays, on any layout, resumed or not."""

from __future__ import annotations

import shutil

import pytest
import tiny

from moetrain.config.hydra.compose import compose_train
from moetrain.config.validate import validate
from moetrain.errors import UserError
from moetrain.verify.command import prove
from moetrain.verify.twin import twin_of

SWITCH = 2
OPTIONS = [
    "router=stable", f"router.switch_step={SWITCH}", "train.steps=4", "checkpoint.every=1",
    "checkpoint.keep_last=9", "optim.weight_decay=0.5", "optim.lr=0.01",
]  # fmt: skip
FROZEN = ("router.words_VW", "router.distilled_EW")


@pytest.mark.usefixtures("training")
def test_frozen_parameters_stay_to_the_bit_and_the_rest_goes_on(corpus, tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    assert tiny.train(corpus, run, *OPTIONS) == 0
    states = [tiny.contents(tiny.checkpoint(run, step))[0] for step in range(1, 5)]
    model = [{k: v for k, v in state.items() if k.startswith("model.")} for state in states]
    for before, after, stopped in zip(model, model[1:], (False, True, True), strict=False):
        still = {key for key, value in after.items() if value.equal(before[key])}
        learnt = {key for key in after if key.endswith(FROZEN)}
        assert len(learnt) == 4
        others = {key for key in after if not key.endswith((*FROZEN, "bias_E"))}
        assert not still & others
        assert still & learnt == (learnt if stopped else set())
    shutil.copytree(run, copy)
    for step in (2, 3, 4):  # resumed before the switch
        shutil.rmtree(tiny.checkpoint(copy, step))
    assert tiny.train(corpus, copy, *OPTIONS) == 0
    tiny.assert_same_state(tiny.checkpoint(copy, 4), tiny.checkpoint(run, 4))


@pytest.mark.real
@pytest.mark.parametrize("layout", [["parallel.ep=2"], ["parallel.dp_replicate=2", "parallel.ep=2"]])
def test_a_layout_freezes_as_one_process_does(layout):
    """Ranks that share a parameter have zeros as its gradient, where one process has none."""
    world = 2 * len(layout)
    cfg = compose_train([*OPTIONS[:2], "optim.weight_decay=0.5", "model.num_experts=8", *layout])
    found = prove(twin_of(cfg, world, 8), 1e-9)
    assert [check.problem for check in found if not check.holds] == []
    assert sum(check.number for check in found) > 200


def test_deepspeed_cannot():
    with pytest.raises(UserError, match="router=stable freezes parameters as it is trained"):
        validate(compose_train(["router=stable", "engine=deepspeed", "model.num_experts=8"]))
