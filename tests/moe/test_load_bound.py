"""A hard bound on load, by a loop over tokens; what later tokens have no say in; what it is refused with.

Shapes: T tokens, B sequences of S, E experts.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from router_cases import chosen, dense_weights, looking_at_logits, normal
from torch import Tensor

from moetrain.moe import RouterContext, build_router

E, B, S = 7, 4, 19
T = B * S


def skewed(seed: int = 1) -> Tensor:
    z_TE = normal(seed, T, E)
    z_TE[:, 2] += 2
    z_TE[S : 2 * S, 5] += 9
    return z_TE


def context() -> RouterContext:
    return replace(RouterContext.default(B, S), valid_T=torch.arange(T) % 5 != 2)


def by_loop(p_TE: Tensor, ctx: RouterContext, k: int, overload: float, size: int) -> Tensor:
    """Differentiable weights [T, E]: the k best scores, of which the closed ones are replaced."""
    rows = []
    for first in range(0, T, size * S):
        load, total = [0] * E, 0
        for t in range(first, first + size * S):
            row = [torch.zeros((), dtype=torch.float64) for _ in range(E)]
            if ctx.valid_T[t]:
                order = sorted(range(E), key=lambda e, t=t: -float(p_TE[t, e].detach()))
                wanted = order[:k]
                total += k
                limit = math.ceil((1 + overload) * total / E - 1e-9)
                kept = [e for e in wanted if load[e] < limit]
                lost = [e for e in wanted if load[e] >= limit]
                added = [e for e in order[k:] if load[e] < limit][: len(lost)]
                for e in kept:
                    row[e] = p_TE[t, e]
                for e, old in zip(added, lost, strict=False):
                    row[e] = p_TE[t, old] * p_TE[t, e] / p_TE[t, old]
                for e in [*kept, *added]:
                    load[e] += 1
                assert max(load) <= limit
            rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize(("group", "size"), [("sequence", 1), ("2", 2)])
@pytest.mark.parametrize("overload", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [1, 3])
def test_closed_experts_are_replaced_in_the_tokens_order(k, overload, group, size):
    router = looking_at_logits("topk", E, top_k=k, renormalize=False, max_overload=overload, group=group)
    z_TE, ctx = skewed().requires_grad_(), context()
    routing = router(z_TE, ctx)
    routing.check()
    expected_TE = by_loop(z_TE.softmax(-1), ctx, k, overload, size)
    torch.testing.assert_close(dense_weights(routing, T), expected_TE.detach(), rtol=1e-12, atol=0)
    direction_TE, a = normal(4, T, E), routing.assignment
    (a.weights_N * direction_TE[a.token_ids_N, a.expert_ids_N()]).sum().backward()
    (wanted,) = torch.autograd.grad((expected_TE * direction_TE).sum(), z_TE)
    torch.testing.assert_close(z_TE.grad, wanted, rtol=1e-9, atol=1e-13)
    plain = looking_at_logits("topk", E, top_k=k, renormalize=False)(z_TE, ctx)
    assert torch.equal(routing.demand_BE, plain.demand_BE)
    assert int(routing.repaired_E.sum()) > 0
    load_GE = chosen(routing, T).view(T // (size * S), -1, E).sum(1)
    mean_G = plain.demand_BE.view(-1, size, E).sum((1, 2)) / E
    assert bool((load_GE <= ((1 + overload) * mean_G - 1e-9).ceil()[:, None]).all())


def test_what_comes_later_has_no_say():
    router = looking_at_logits("topk", E, top_k=2, max_overload=0.1)
    before_TE = dense_weights(router(skewed(), context()), T)
    for place in range(0, S, 4):
        z_TE = skewed()
        z_TE.view(B, S, E)[:, place + 1 :] = normal(9, B, S - place - 1, E)
        after_TE = dense_weights(router(z_TE, context()), T)
        kept = (slice(None), slice(0, place + 1))
        assert torch.equal(after_TE.view(B, S, E)[kept], before_TE.view(B, S, E)[kept])


@pytest.mark.parametrize("name", ["relu", "threshold", "sigmoid", "moepp", "sparsemixer2"])
def test_any_number_of_choices(name):
    torch.manual_seed(0)
    router = build_router(name, d_model=E, num_experts=E, max_overload=0.2).double()
    routing = router(skewed(), context())
    routing.check()
    (routing.assignment.weights_N.sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in router.parameters())
    load_BE = chosen(routing, T).view(B, S, -1).sum(1)
    mean_B1 = routing.demand_BE.double().mean(1, keepdim=True)
    assert bool((load_BE <= (1.2 * mean_B1 - 1e-9).ceil()).all())


def test_a_bound_that_nothing_reaches_changes_nothing():
    z_TE, ctx = skewed(), context()
    plain = dense_weights(looking_at_logits("topk", E, top_k=2)(z_TE, ctx), T)
    loose = looking_at_logits("topk", E, top_k=2, max_overload=1e6)
    tight = looking_at_logits("topk", E, top_k=2, max_overload=0.0)
    assert torch.equal(dense_weights(loose(z_TE, ctx), T), plain)
    assert torch.equal(dense_weights(tight.eval()(z_TE, ctx), T), plain)


@pytest.mark.parametrize(("batch", "seq"), [(0, 5), (2, 0), (1, 1)])
def test_hardly_a_token(batch, seq):
    router = looking_at_logits("topk", E, top_k=2, max_overload=0.5)
    routing = router(normal(0, batch * seq, E), RouterContext.default(batch, seq))
    routing.check()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("topk", {"capacity_factor": 1.0}, "router.max_overload=0.5 decides how many tokens"),
        ("topk", {"rounding": "up"}, "router.max_overload=0.5 decides how many tokens"),
        ("topk", {"group": "all"}, "not of router.group=all"),
        ("hash", {}, "router.max_overload=0.5 ranks experts by scores, and router=hash"),
    ],
)
def test_what_does_not_fit_is_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        build_router(name, d_model=E, num_experts=E, max_overload=0.5, **options)
