"""Collapses planted into runs of four routers: each is named within 50 steps, and nothing before.

Every token gets one large value more, in a direction that the router answers with one expert (or two): what
an outlier of the residual stream does.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor, nn

from moetrain.train.log.jsonl import read_metrics
from moetrain.train.loop import Loop

pytestmark = pytest.mark.usefixtures("training")

PLANTED, STEPS = 30, 90
OPTIONS = ["model.num_experts=7", f"train.steps={STEPS}", "checkpoint.every=0", "train.eval_every=0"]


def plant(router: nn.Module, favoured: int, size: float) -> None:
    """Add ``size`` to the logits of the first ``favoured`` experts, and take it from the others."""
    direction_D = torch.zeros(router.d_model)
    direction_D[3] = 8.0
    sign_E = torch.full((router.num_experts,), -1.0)
    sign_E[:favoured] = 1.0
    with torch.no_grad():
        router.weight_ED[:, 3] = sign_E * size / 8.0

    def shifted(module: nn.Module, arguments: tuple[Tensor, object]) -> tuple[Tensor, object]:
        x_TD, ctx = arguments
        return x_TD + direction_D.to(x_TD), ctx

    router.register_forward_pre_hook(shifted)


@pytest.mark.parametrize(("name", "favoured"), [("topk", 2), ("switch", 1), ("sigmoid", 2), ("relu", 1)])
def test_a_planted_collapse_is_named(name, favoured, corpus, tmp_path, monkeypatch, capsys):
    one_step = Loop._one_step

    def planting(loop: Loop) -> None:
        if loop.state.step == PLANTED:
            for router in loop.state.task.model.routers().values():
                plant(router, favoured, 6.0)
        one_step(loop)

    monkeypatch.setattr(Loop, "_one_step", planting)
    run = tmp_path / "run"
    assert tiny.train(corpus, run, f"router={name}", *OPTIONS) == 0
    rows = [row for row in read_metrics(run / "alarms.jsonl") if row["raised"]]
    assert min(row["step"] for row in rows) > PLANTED
    named = {layer for row in rows if row["step"] <= PLANTED + 50 for layer in row["layers"]}
    assert named == {0, 1}
    collapses = [row for row in rows if row["alarm"] == "collapse"]
    assert sorted(layer for row in collapses for layer in row["layers"]) == [0, 1]  # each said once
    said = [line for line in capsys.readouterr().out.splitlines() if "ALARM collapse" in line]
    assert len(said) == len(collapses)
    assert all("may help: " in line for line in said)
    late = sorted({row["step"] - PLANTED for row in collapses})
    print(f"{name}: a collapse in 2 of 2 layers, named {late} steps after it was planted")
