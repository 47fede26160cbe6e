"""GPT-OSS's options over ranks: sinks, windows of some layers, biases of experts and of logits."""

from __future__ import annotations

import pytest

from moetrain.config.hydra.compose import compose_train
from moetrain.verify.command import prove
from moetrain.verify.twin import twin_of

LAYOUTS = {"ep 2 x efsdp 2": (4, ["parallel.ep=2"]), "efsdp 2": (2, [])}


@pytest.mark.real
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_equals_one_process(layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    overrides = [
        "experiment=gpt_oss_20b",
        "model.num_experts=6",
        "parallel.dispatcher=all_to_all",
        "train.recompute=false",
    ]
    overrides += parallel
    found = prove(twin_of(compose_train(overrides), world, 8), 1e-9)
    assert [check.problem for check in found if not check.holds] == []
    assert sum(check.number for check in found) > 100
