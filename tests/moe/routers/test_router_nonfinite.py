"""What is not finite goes through every router and solver: no hang, no error, and the loss tells of it.

T = B S tokens, D model, E experts.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.moe import ROUTERS, MoELayer, RouterContext, Routing, build_router
from moetrain.moe.solvers import auction, balanced_assignment, sinkhorn_plan
from moetrain.moe.topk_ops import top_ids

B, S, D, E = 2, 12, 8, 6
SPOILT = 3  # the token
CONTEXT = RouterContext(B, S, torch.arange(B), torch.arange(B * S) % 7)
NAMES = sorted(ROUTERS)
BAD = [math.nan, math.inf, -math.inf]
CAPACITY = {"capacity_factor": 1.0, "eval_capacity_factor": 1.0}
DEVICES = {"local_devices": 2, "local_sequences": 1}
LIMITED: list[dict[str, object]] = [
    {**CAPACITY, "repair": rule, **(DEVICES if "local" in rule else {})}
    for rule in ("next_expert", "local", "fill_in", "local_fill_in")
]
OPTIONS: list[dict[str, object]] = [{}, {"group": "2"}, *LIMITED]
OF_ONE: dict[str, list[dict[str, object]]] = {
    "base": [{"solver": "auction"}],
    "expert_choice": [{"max_experts": 2}],
    "sinkhorn": [{"top_k": 1}],
}


def spoilt(where: str, value: float) -> Tensor:
    x_TD = torch.randn(B * S, D, generator=torch.Generator().manual_seed(5))
    x_TD[(SPOILT, 2) if where == "element" else SPOILT] = value
    return x_TD


def layers(name: str) -> list[tuple[dict[str, object], MoELayer]]:
    found = []
    for options in [*OPTIONS, *OF_ONE.get(name, [])]:
        if options.get("repair", "none") != "none" and not ROUTERS[name].cls.has_scores:
            continue
        torch.manual_seed(1)
        layer = MoELayer(D, E, 4, router=name, router_options=options)
        for parameter in layer.router.parameters():
            if not parameter.any():  # what starts at zero, as trained
                torch.nn.init.normal_(parameter)
        found.append((options, layer))
    return found


def well_formed(routing: Routing) -> bool:
    """Whatever the weights: every assignment is of a token and an expert that exist, and counted."""
    tokens_N = routing.assignment.token_ids_N
    inside = bool(((tokens_N >= 0) & (tokens_N < B * S)).all())
    return inside and int(routing.assignment.counts_E.sum()) == len(tokens_N) == len(
        routing.assignment.weights_N
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_input_that_is_not_finite_reaches_the_output(name):
    for options, layer in layers(name):
        for where, value in itertools.product(("element", "token"), BAD):
            for training in (True, False):
                y_BSD, routing = layer.train(training)(spoilt(where, value).view(B, S, D), CONTEXT)
                told = f"{options}, {where}, {value}, {'training' if training else 'evaluation'}"
                assert well_formed(routing), told
                assert not y_BSD.flatten(0, 1)[SPOILT].isfinite().all(), told
                if routing.logits_TE is not None:
                    assert not routing.logits_TE[SPOILT].isfinite().all(), told


@pytest.mark.parametrize("name", [n for n in NAMES if ROUTERS[n].cls.has_logits])
def test_a_weight_of_the_router_that_is_not_finite(name):
    for value, training in itertools.product(BAD, (True, False)):
        router = build_router(name, d_model=D, num_experts=E).train(training)
        with torch.no_grad():
            next(router.parameters()).view(-1)[0] = value
            routing = router(spoilt("element", 1.0), CONTEXT)
        assert well_formed(routing)
        assert routing.logits_TE is not None
        assert not routing.logits_TE.isfinite().all()


ODD = st.sampled_from([*BAD, 0.0, 1.0, -1.0, 1e30, -1e30, 3e38])
RECTANGLES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4)).flatmap(
    lambda shape: st.lists(ODD, min_size=math.prod(shape), max_size=math.prod(shape)).map(
        lambda values: torch.tensor(values).view(shape)
    )
)


@given(RECTANGLES, st.booleans(), st.integers(0, 2**20))
@settings(max_examples=80, deadline=None)
def test_solvers_take_any_numbers(scores_GLE, wide, seed):
    scores_GLE = scores_GLE.double() if wide else scores_GLE
    groups, length, num_experts = scores_GLE.shape
    valid_GL = torch.rand(groups, length, generator=torch.Generator().manual_seed(seed)) < 0.8
    plan_GLE = sinkhorn_plan(scores_GLE, valid_GL, 1e-2)
    assert plan_GLE.dtype is scores_GLE.dtype
    expert_GL, _ = auction(scores_GLE, valid_GL, 0.05 * float(scores_GLE.nan_to_num(0, 1, -1).abs().max()))
    for scores_LE, plan_LE, expert_L, valid_L in zip(scores_GLE, plan_GLE, expert_GL, valid_GL, strict=True):
        own_LE = scores_LE[valid_L]
        broken = bool((own_LE.isnan() | own_LE.isposinf()).any())
        assert bool(plan_LE[valid_L].isnan().all()) == (broken or not len(own_LE))
        assert plan_LE[~valid_L].isneginf().all()
        counts = torch.bincount(expert_L[valid_L], minlength=num_experts)
        assert len(counts) == num_experts
        assert counts.max() - counts.min() <= 1
        found = balanced_assignment(own_LE.double().numpy()).expert_T
        exact = np.bincount(found, minlength=num_experts)
        assert exact.max() - exact.min() <= 1


def test_one_group_without_a_plan_leaves_the_others_theirs():
    logits_GLE = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
    valid_GL = torch.ones(3, 7, dtype=torch.bool)
    whole_GLE = sinkhorn_plan(logits_GLE, valid_GL, 1e-3)
    logits_GLE[1, 2, 3] = math.nan
    plan_GLE = sinkhorn_plan(logits_GLE, valid_GL, 1e-3)
    assert plan_GLE[1].isnan().all()
    torch.testing.assert_close(plan_GLE[[0, 2]], whole_GLE[[0, 2]], rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_of_either_sign_is_the_largest(dtype, sign):
    nan = torch.copysign(torch.tensor(math.nan, dtype=dtype), torch.tensor(sign, dtype=dtype))
    scores = torch.stack([torch.tensor(math.inf, dtype=dtype), nan, torch.tensor(-math.inf, dtype=dtype)])
    assert top_ids(scores, 3).tolist() == [1, 0, 2]


@pytest.mark.parametrize("name", ["sinkhorn", "base", "expert_choice", "relu", "dynmoe"])
def test_a_step_with_nan_is_skipped_and_the_run_goes_on(
    name, training, corpus, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(MoELayer, "forward", MoELayer.forward)  # what the plug-in changes comes back
    monkeypatch.setenv("FAULTY_STEP", "2")
    import faulty_input

    monkeypatch.setattr(MoELayer, "forward", faulty_input._spoil)
    options = [f"router={name}", "train.steps=4", "train.on_nonfinite=skip"]
    assert tiny.train(corpus, tmp_path / "run", *options) == 0
    assert "step 3: the loss is nan" in capsys.readouterr().out
    losses = [row["train/loss"] for row in tiny.steps(tmp_path / "run")]
    assert [step for step, loss in enumerate(losses) if loss is None or not math.isfinite(loss)] == [2]
