"""VQMoE by loops: both choices and their mix, the codes' loss, and how an unused code moves.

Shapes: T tokens, D model, E experts and codes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from router_cases import dense_weights, normal
from torch import Tensor

from moetrain.moe import RouterContext, Routing, build_router
from moetrain.moe.routers.vq import VQRouter

D, E, B, S = 5, 7, 3, 13
T = B * S


def vq(**options: object) -> VQRouter:
    torch.manual_seed(2)
    router = build_router("vq", d_model=D, num_experts=E, **options).double()
    assert isinstance(router, VQRouter)
    with torch.no_grad():
        router.codes_ED.mul_(10)
        router.mix_2D.mul_(5)
    return router


def context(step: int = 0) -> RouterContext:
    return replace(RouterContext.default(B, S), valid_T=torch.arange(T) % 5 != 2, step=step)


def nearest(router: VQRouter, x_TD: Tensor) -> list[int]:
    def far(x_D: Tensor, code_D: Tensor) -> float:
        if router.options.distance.name == "l2":
            return float((x_D - code_D).square().sum())
        return -float(torch.cosine_similarity(x_D, code_D, dim=0))

    codes_ED = router.codes_ED.detach()
    return [min(range(E), key=lambda e, x=x_D: far(x, codes_ED[e])) for x_D in x_TD.detach()]


def weights_by_hand(router: VQRouter, x_TD: Tensor, top_k: int) -> Tensor:
    """Differentiable, of every token, padded or not."""
    rows, codes = [], nearest(router, x_TD)
    for x_D, code in zip(x_TD, codes, strict=True):
        z = [(x_D * w_D).sum() / w_D.square().sum().sqrt() for w_D in router.weight_ED]
        best = sorted(range(E), key=lambda e, z=z: -float(z[e].detach()))[:top_k]
        powers = {e: z[e].exp() for e in best}
        first, second = (
            (x_D * w_D).sum() + bias for w_D, bias in zip(router.mix_2D, router.mix_bias_2, strict=True)
        )
        share = first.exp() / (first.exp() + second.exp())
        row = [torch.zeros((), dtype=torch.float64) for _ in range(E)]
        for e in best:
            row[e] = row[e] + share * powers[e] / sum(powers.values())
        row[code] = row[code] + 1 - share
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("top_k", "distance"), [(1, "l2"), (3, "cosine"), (7, "l2")])
def test_both_choices_are_mixed(top_k, distance, training):
    router, ctx = vq(top_k=top_k, distance=distance).train(training), context()
    x_TD = normal(1, T, D).requires_grad_()
    routing = router(x_TD, ctx)
    routing.check()
    expected_TE = weights_by_hand(router, x_TD, top_k) * ctx.valid_T[:, None]
    torch.testing.assert_close(dense_weights(routing, T), expected_TE.detach(), rtol=1e-11, atol=1e-13)
    taken_T = (expected_TE > 0).sum(1)[ctx.valid_T]
    assert {top_k, min(top_k + 1, E)} == set(taken_T.tolist())  # with the code's among the best, and beside
    direction_TE, a = normal(3, T, E), routing.assignment
    (a.weights_N * direction_TE[a.token_ids_N, a.expert_ids_N()]).sum().backward()
    found = [x_TD.grad, *(p.grad for p in (router.weight_ED, router.mix_2D, router.mix_bias_2))]
    assert router.codes_ED.grad is None
    leaves = [x_TD, router.weight_ED, router.mix_2D, router.mix_bias_2]
    wanted = torch.autograd.grad((expected_TE * direction_TE).sum(), leaves)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_the_loss_draws_codes_to_tokens_and_tokens_to_codes(distance):
    router, ctx = vq(distance=distance, commitment=0.25), context()
    x_TD = normal(1, T, D).requires_grad_()
    penalty = router(x_TD, ctx).penalty
    codes = nearest(router, x_TD)
    valid = [t for t in range(T) if ctx.valid_T[t]]
    total, count = 0.0, D * len(valid)
    of_codes, of_tokens = torch.zeros(E, D, dtype=torch.float64), torch.zeros(T, D, dtype=torch.float64)
    for t in valid:
        gap_D = x_TD.detach()[t] - router.codes_ED.detach()[codes[t]]
        total += 1.25 * float(gap_D.square().sum()) / count
        of_codes[codes[t]] -= 2 * gap_D / count
        of_tokens[t] = 0.25 * 2 * gap_D / count
    assert float(penalty.detach()) == pytest.approx(total, rel=1e-12)
    penalty.backward()
    torch.testing.assert_close(router.codes_ED.grad, of_codes, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(x_TD.grad, of_tokens, rtol=1e-9, atol=1e-13)


def stats(router: VQRouter, x_TD: Tensor, ctx: RouterContext) -> Tensor:
    routing: Routing = router(x_TD, ctx)
    assert routing.stats is not None
    return routing.stats


def test_the_least_used_code_moves_to_a_token_that_was_drawn():
    """In closed form, over steps; in some of these no level has a single token, and nothing moves."""
    decay = 0.9
    router, x_TD = vq(usage_decay=decay), normal(4, T, D)
    with torch.no_grad():
        router.codes_ED[3] = 100.0  # near no token
    usage, moved = [0.0] * E, 0
    for step in range(20):
        ctx = context(step)
        codes = nearest(router, x_TD)
        used = [codes[t] for t in range(T) if ctx.valid_T[t]]
        usage = [decay * u + (1 - decay) * used.count(e) / len(used) for e, u in enumerate(usage)]
        before_ED = router.codes_ED.detach().clone()
        router.after_step(stats(router, x_TD, ctx))
        torch.testing.assert_close(router.usage_E.tolist(), usage, rtol=1e-5, atol=1e-7)
        changed = (router.codes_ED != before_ED).any(1).nonzero().flatten().tolist()
        least = min(range(E), key=lambda e, u=usage: u[e])
        strength = math.exp(-10 * E * usage[least] / (1 - decay) - 1e-3)
        candidates_TD = (1 - strength) * before_ED[least] + strength * x_TD[ctx.valid_T]
        if changed:
            moved += 1
            assert changed == [least]
            gap_T = (candidates_TD - router.codes_ED.detach()[least]).abs().amax(1)
            assert gap_T.min() < 1e-4 * strength + 1e-12
        if step == 0:  # of the codes that no token is near to the first
            assert strength > 0.99
    assert 5 <= moved < 20


def test_cut_into_parts_the_same_token_is_drawn():
    router, x_TD = vq(usage_decay=0.9), normal(4, T, D)
    whole = stats(router, x_TD, context())
    parts = []
    for b in range(B):
        rows, ctx = slice(S * b, S * b + S), context()
        ctx = replace(ctx, batch=1, sample_ids_B=ctx.sample_ids_B[b : b + 1], valid_T=ctx.valid_T[rows])
        parts.append(stats(router, x_TD[rows], ctx))
    summed = sum(parts)
    levels = slice(E, E + 24)
    assert torch.equal(summed[: E + 24], whole[: E + 24])
    single = (whole[levels] == 1).nonzero().flatten().tolist()
    of_level = [stat[E + 24 :].view(24, D)[single] for stat in (summed, whole)]
    assert torch.equal(*of_level)
    assert len(single) > 0
    for row_D in of_level[0]:
        assert (row_D == x_TD).all(1).any()


def test_nothing_is_counted_where_codes_stay_and_in_evaluation():
    assert vq()(normal(4, T, D), context()).stats is None
    assert vq(usage_decay=0.9).eval()(normal(4, T, D), context()).stats is None
