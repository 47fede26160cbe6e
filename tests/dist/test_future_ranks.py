"""Layers that predict further tokens over ranks: equal to one process, and exported alike."""

from __future__ import annotations

import pytest

from moetrain.config.hydra.compose import compose_train
from moetrain.verify.command import prove
from moetrain.verify.twin import twin_of

AHEAD = [
    "model.future.layers=2", "train.future.weight=0.5", "router=topk_sigmoid", "balance=aux_free",
    "model.first_dense=1", "model.num_shared_experts=1", "model.num_experts=8",
]  # fmt: skip
DENSE = ["model.future.dense=true", "model.future.shared_norm=true"]
LAYOUTS = {
    "ep 2": (2, ["parallel.ep=2"]),
    "efsdp 2": (2, []),
    "hsdp 2 x ep 2": (4, ["parallel.dp_replicate=2", "parallel.ep=2"]),
    "ep 2, recompute": (2, ["parallel.ep=2", "train.recompute=true"]),
}
CASES = {name: (AHEAD, layout) for name, layout in LAYOUTS.items()}
CASES["efsdp 2, dense, shared norm"] = ([*AHEAD, *DENSE], LAYOUTS["efsdp 2"])
FAST = ("ep 2",)


@pytest.mark.parametrize(
    "case", [pytest.param(n, marks=pytest.mark.real if n in FAST else pytest.mark.slow) for n in CASES]
)
def test_layers_that_look_ahead_over_ranks(case: str) -> None:
    options, (world, layout) = CASES[case]
    found = prove(twin_of(compose_train([*options, *layout]), world, 8), 1e-9)
    assert [check.problem for check in found if not check.holds] == []
    assert sum(check.number for check in found) > 100
