"""MaskMoE: which experts an id sees, and a softmax over these by loops.

Shapes: T tokens, D model, E experts.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from router_cases import chosen, dense_weights, looking_at_logits, normal

from moetrain.moe import RouterContext, build_router
from moetrain.moe.routers.mask import frequent_ids

E = 8


def context(ids_T: torch.Tensor, **given: object) -> RouterContext:
    return replace(RouterContext.default(1, len(ids_T)), token_ids_T=ids_T, **given)


@pytest.fixture
def counts(tmp_path):
    """Ids 0 to 9 are frequent: 10 times 9 of 100 tokens; of the rest one each, and 19 is not counted."""
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({str(i): 9 if i < 10 else 1 for i in range(20) if i != 19} | {"18": 2}))
    return str(file)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_best_of_what_the_id_sees(counts, top_k, training):
    router = looking_at_logits("mask", E, top_k=top_k, visible=3, rare_visible=2, frequencies=counts)
    ids_T = torch.arange(60) % 24
    z_TE = normal(1, 60, E).requires_grad_()
    ctx = context(ids_T, valid_T=torch.arange(60) % 5 != 3)
    routing = router.train(training)(z_TE, ctx)
    routing.check()
    seen_TE = router.seen(ids_T)
    assert seen_TE.sum(1).tolist() == [3 if i < 10 else 2 for i in ids_T.tolist()]
    expected_TE = torch.zeros(60, E, dtype=torch.float64)
    for t in range(60):
        if t % 5 == 3:
            continue
        visible = [e for e in range(E) if seen_TE[t, e]]
        total = sum(math.exp(z_TE[t, e]) for e in visible)
        for e in sorted(visible, key=lambda e, t=t: -float(z_TE[t, e]))[:top_k]:
            expected_TE[t, e] = math.exp(z_TE[t, e]) / total
    torch.testing.assert_close(dense_weights(routing, 60), expected_TE, rtol=1e-12, atol=0)
    assert torch.equal(chosen(routing, 60), expected_TE > 0)
    routing.assignment.weights_N.square().sum().backward()
    assert not z_TE.grad[~seen_TE].any()
    # d/dz_e of sum_c p_c^2 is 2 p_e (c_e p_e - sum_c p_c^2), c: whether it was chosen
    for t in range(60):
        p_E = z_TE[t].detach().exp() * seen_TE[t]
        p_E, c_E = p_E / p_E.sum(), (expected_TE[t] > 0).double()
        slope_E = 2 * p_E * (c_E * p_E - (c_E * p_E.square()).sum())
        torch.testing.assert_close(z_TE.grad[t], slope_E, rtol=1e-9, atol=1e-13)


def test_an_id_that_sees_one_always_goes_there_with_weight_one():
    router = build_router("mask", d_model=5, num_experts=E, visible=1).double()
    ids_T = torch.arange(40) % 13
    experts: dict[int, set[int]] = {}
    for step in range(5):
        routing = router(normal(step, 40, 5), context(ids_T, step=step))
        assert torch.equal(routing.assignment.weights_N, torch.ones(40, dtype=torch.float64))
        for t, e in enumerate(chosen(routing, 40).double().argmax(1).tolist()):
            experts.setdefault(int(ids_T[t]), set()).add(e)
    assert {len(found) for found in experts.values()} == {1}


def test_what_ids_see_is_even_nested_and_of_the_salt():
    ids_T = torch.arange(40_000)
    wide = build_router("mask", d_model=5, num_experts=E, visible=3).seen(ids_T)
    narrow = build_router("mask", d_model=5, num_experts=E, visible=1).seen(ids_T)
    other = build_router("mask", d_model=5, num_experts=E, visible=1, salt=1).seen(ids_T)
    assert (wide & narrow).sum() == 40_000
    for mask_TE, share in ((wide, 3 / E), (narrow, 1 / E), (other, 1 / E)):
        error_E = mask_TE.double().mean(0) - share
        assert error_E.abs().max() < 5 * math.sqrt(share * (1 - share) / 40_000)
    assert abs(float((narrow & other).sum()) / 40_000 - 1 / E) < 5 * math.sqrt(1 / E / 40_000)


@pytest.mark.parametrize("training", [True, False])
def test_with_every_expert_in_sight_it_is_top_k(training):
    z_TE, ctx = normal(2, 31, E), context(torch.arange(31))
    masked = looking_at_logits("mask", E, top_k=2, visible=E).train(training)(z_TE, ctx)
    plain = looking_at_logits("topk", E, top_k=2, renormalize=False).train(training)(z_TE, ctx)
    assert torch.equal(dense_weights(masked, 31), dense_weights(plain, 31))


def test_frequent_ids_hold_the_share():
    counts = {4: 10, 1: 40, 0: 10, 7: 30, 2: 0, 3: 10}
    for share, held in (
        (0.0, set()),
        (0.3, {1}),
        (0.4, {1}),
        (0.41, {1, 7}),
        (0.75, {0, 1, 7}),
        (1, {0, 1, 3, 4, 7}),
    ):
        assert {i for i, frequent in enumerate(frequent_ids(counts, share)) if frequent} == held


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"visible": 9}, "router.visible=9 must lie between top_k=1 and num_experts=8"),
        ({"visible": 1, "top_k": 2}, "router.visible=1 must lie between top_k=2"),
        ({"visible": 2, "rare_visible": 3}, "router.rare_visible=3 exceeds the 2 experts"),
        ({"frequencies": "/nowhere/counts.json"}, "router.frequencies=/nowhere/counts.json"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        build_router("mask", d_model=5, num_experts=E, **options)


def test_ids_are_needed():
    with pytest.raises(ValueError, match="router=mask needs token ids"):
        build_router("mask", d_model=5, num_experts=E)(torch.randn(4, 5), RouterContext.default(1, 4))
