"""Capacity: who survives, by brute force and by the properties of each order.

Shapes: T tokens, E experts, N assignments, B sequences, G routing groups.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import reassigned
from scipy import stats
from torch import Tensor

from moetrain.moe import MoELayer, RouterContext, Routing
from moetrain.moe.assign import _DROP_SALT, apply_capacity, from_token_choice
from moetrain.moe.options import DropOrder

ORDERS = ["position", "probability", "random"]
quick = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def full_routing(ctx: RouterContext, num_experts: int, k: int, seed: int) -> Routing:
    """K distinct random experts a token, skewed to the first ones, with distinct random weights."""
    generator = torch.Generator().manual_seed(seed)
    tokens = ctx.batch * ctx.seq
    appeal_TE = torch.rand(tokens, num_experts, generator=generator) - torch.arange(num_experts) / num_experts
    weights_TK = torch.rand(tokens, k, generator=generator, dtype=torch.float64)
    return from_token_choice(appeal_TE.topk(k).indices, weights_TK, ctx, num_experts)


def limit(routing: Routing, ctx: RouterContext, factor: float, order: str, **kwargs: Any) -> Routing:
    arguments = {"minimum": 0, "group": "sequence", **kwargs}
    kept = apply_capacity(routing, ctx, factor, order=DropOrder[order], **arguments)
    kept.check()
    assert torch.equal(kept.demand_BE, routing.demand_BE)
    return kept


def pairs(routing: Routing) -> dict[tuple[int, int], float]:
    """(expert, token) -> weight, in the routing's own order."""
    keys = zip(
        routing.assignment.expert_ids_N().tolist(), routing.assignment.token_ids_N.tolist(), strict=True
    )
    return dict(zip(keys, routing.assignment.weights_N.tolist(), strict=True))


@quick
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 11), st.integers(1, 5)),
    st.sampled_from(ORDERS), st.sampled_from([1, 2, 3, 4]), st.integers(0, 3), st.integers(1, 20),
    st.booleans(), st.integers(0, 99), st.data(),
)  # fmt: skip
def test_kept_is_the_smaller_of_demand_and_capacity(
    shape: tuple[int, int, int],
    order: str,
    per_group: int,
    minimum: int,
    tenths: int,
    padded: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    num_groups, seq, num_experts = shape
    batch, k = num_groups * per_group, data.draw(st.integers(1, num_experts))
    valid_T = torch.rand(batch * seq, generator=torch.Generator().manual_seed(seed)) < 0.7 if padded else None
    ctx = replace(RouterContext.default(batch, seq), valid_T=valid_T)
    routing = full_routing(ctx, num_experts, k, seed)
    group = "sequence" if per_group == 1 else str(per_group)
    kept = limit(routing, ctx, tenths / 10, order, minimum=minimum, group=group)
    before, after = pairs(routing), pairs(kept)
    assert after.items() <= before.items()  # a subset, weights untouched
    for g in range(num_groups):
        tokens = range(g * per_group * seq, (g + 1) * per_group * seq)
        wanted = [(e, t) for e, t in before if t in tokens]
        capacity = max(minimum, -(-tenths * len(wanted) // (10 * num_experts)))
        for expert in range(num_experts):
            rivals = [t for e, t in wanted if e == expert]
            survivors = [t for t in rivals if (expert, t) in after]
            assert len(survivors) == min(len(rivals), capacity)
            dropped = [t for t in rivals if t not in survivors]
            if dropped and survivors and order == "position":
                assert max(survivors) < min(dropped)
            if dropped and survivors and order == "probability":
                assert min(before[expert, t] for t in survivors) >= max(before[expert, t] for t in dropped)


@pytest.mark.parametrize("order", ORDERS)
def test_a_capacity_of_all_tokens_drops_nothing(order: str) -> None:
    """Whatever the scores look like: elsewhere a top-k over logits once let unchosen zeros win."""
    ctx = RouterContext.default(2, 13)
    negative = full_routing(ctx, 5, 2, 0)
    for weights_N in (
        negative.assignment.weights_N,
        negative.assignment.weights_N - 7,
        torch.zeros_like(negative.assignment.weights_N),
    ):
        routing = reassigned(negative, weights_N=weights_N)
        for factor in (
            2.5,
            3.0,
            100.0,
        ):  # 2.5: exactly 13 places an expert; the rest more than there are tokens
            kept = limit(routing, ctx, factor, order)
            assert torch.equal(kept.assignment.token_ids_N, routing.assignment.token_ids_N)
            assert torch.equal(kept.assignment.weights_N, routing.assignment.weights_N)


@pytest.mark.parametrize("order", ORDERS)
def test_a_factor_that_asks_for_more_places_than_tokens(order: str) -> None:
    """factor * k > E. The layer's output is then that without any capacity."""
    torch.manual_seed(0)
    options = {"top_k": 3, "score": "sigmoid", "drop_order": order, "capacity_factor": 2.0}
    layer = MoELayer(3, 5, 4, router_options=options).double()
    x_BSD = torch.randn(2, 7, 3, dtype=torch.float64)
    limited = layer(x_BSD)[0]
    layer.eval()  # dropless
    assert torch.equal(limited, layer(x_BSD)[0])


def test_position_drops_the_last_and_their_rows_are_zero() -> None:
    torch.manual_seed(0)
    options = {"top_k": 1, "capacity_factor": 0.5, "min_capacity": 0, "renormalize": False}
    layer = MoELayer(3, 5, 4, router_options=options).double()
    with torch.no_grad():
        layer.router.weight_ED.copy_(torch.tensor([[0.0] * 3, [9.0] * 3, [0.0] * 3, [0.0] * 3]))
    x_BSD = torch.rand(2, 23, 3, dtype=torch.float64) + 0.1
    y_BSD, routing = layer(x_BSD)
    assert routing.assignment.counts_E.tolist() == [0, 6, 0, 0]  # ceil(0.5 * 23 / 4) = 3 a sequence
    assert routing.demand_E.tolist() == [0, 46, 0, 0]
    assert y_BSD.any(-1).tolist() == [[True] * 3 + [False] * 20] * 2


@pytest.mark.parametrize(
    ("factor", "tokens", "num_experts", "capacity"),
    [
        (1.1, 50, 5, 11),
        (1.1, 100, 2, 55),
        (0.55, 100, 1, 55),
        (1.11, 30, 3, 12),
        (0.07, 30, 3, 1),
        (1.0, 31, 3, 11),
    ],
)
def test_exact_products_are_not_rounded_up(
    factor: float, tokens: int, num_experts: int, capacity: int
) -> None:
    """1.1 * 50 is 55.00000000000001 in binary, and a fifth of it would ask for 12 places."""
    ctx = RouterContext.default(1, tokens)
    routing = from_token_choice(torch.zeros(tokens, 1).long(), torch.ones(tokens, 1), ctx, num_experts)
    assert int(limit(routing, ctx, factor, "position").assignment.counts_E[0]) == capacity


@pytest.mark.parametrize("order", ORDERS)
def test_who_survives_in_a_worked_example(order: str) -> None:
    """Two sequences of four tokens, all on expert 1 of two: two places a sequence."""
    ctx = replace(RouterContext.default(2, 4), seed=5)
    weights_TK = torch.tensor([0.1, 0.4, 0.3, 0.2, 0.5, 0.5, 0.1, 0.9]).view(8, 1)
    routing = from_token_choice(torch.ones(8, 1).long(), weights_TK, ctx, 2)
    noise_T = ctx.uniform((8, 2), _DROP_SALT)[:, 1]
    lucky = [
        4 * b + i for b in (0, 1) for i in noise_T[4 * b : 4 * b + 4].topk(2).indices.sort().values.tolist()
    ]
    want = {
        "position": [0, 1, 4, 5],
        "probability": [1, 2, 4, 7],
        "random": lucky,
    }  # 4 and 5 tie: the first stays
    assert limit(routing, ctx, 1.0, order).assignment.token_ids_N.tolist() == want[order]


@pytest.mark.parametrize("order", ORDERS)
def test_a_group_is_routed_alike_in_any_batch(order: str) -> None:
    """Groups of one or two sequences, alone or together, padded or not: the same survivors."""
    options = {"capacity_factor": 0.7, "min_capacity": 1, "drop_order": order, "jitter": 0.1, "top_k": 2}
    torch.manual_seed(0)
    x_BSD, ids_B = torch.randn(8, 5, 3, dtype=torch.float64), torch.arange(8) * 3 + 1
    valid_BS = torch.rand(8, 5) < 0.8
    for group, micro_batches in (("sequence", [1, 2, 4]), ("2", [2, 4]), ("4", [4])):
        torch.manual_seed(1)
        layer = MoELayer(3, 5, 7, router_options={**options, "group": group}).double()

        def run(rows: slice, layer: MoELayer = layer) -> tuple[Tensor, dict[tuple[int, int], float]]:
            batch = len(ids_B[rows])
            ctx = RouterContext(batch, 5, ids_B[rows], valid_T=valid_BS[rows].reshape(-1), seed=4, step=2)
            y, routing = layer(x_BSD[rows], ctx)
            found = {(e, t + 5 * (rows.start or 0)): w for (e, t), w in pairs(routing).items()}
            return y.detach(), found

        whole, kept = run(slice(0, 8))
        assert len(kept) < 2 * int(valid_BS.sum())
        for size in micro_batches:
            parts = [run(slice(i, i + size)) for i in range(0, 8, size)]
            torch.testing.assert_close(torch.cat([y for y, _ in parts]), whole, rtol=0, atol=1e-12)
            assert {pair: w for _, found in parts for pair, w in found.items()} == pytest.approx(kept)


def test_groups_couple_their_sequences() -> None:
    """What one sequence leaves free, the other of its group may use."""
    ctx = RouterContext.default(2, 4)
    ids_TK = torch.tensor([0, 0, 0, 0, 1, 1, 1, 0]).view(8, 1)
    routing = from_token_choice(ids_TK, torch.ones(8, 1), ctx, 2)
    assert limit(routing, ctx, 1.0, "position").assignment.counts_E.tolist() == [3, 2]
    assert limit(routing, ctx, 1.0, "position", group="2").assignment.counts_E.tolist() == [4, 3]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("3", "does not divide a batch of 2 sequences"),
        ("0", "positive"),
        ("-1", "positive"),
        ("some", "positive"),
    ],
)
def test_impossible_groups_are_refused(group: str, message: str) -> None:
    ctx = RouterContext.default(2, 3)
    with pytest.raises(ValueError, match=message):
        limit(full_routing(ctx, 3, 1, 0), ctx, 1.0, "position", group=group)


def test_random_survival_does_not_depend_on_the_position() -> None:
    """Chi-square over steps and seeds. C of T survive each time, so the statistic is scaled by 1 - C / T."""
    tokens, capacity, draws = 19, 5, 600
    survived_T = torch.zeros(tokens)
    for i in range(draws):
        ctx = replace(RouterContext.default(1, tokens), seed=i % 3, step=i // 3, layer=1)
        routing = from_token_choice(torch.zeros(tokens, 1).long(), torch.ones(tokens, 1), ctx, 1)
        kept = limit(routing, ctx, capacity / tokens, "random")
        assert int(kept.assignment.counts_E[0]) == capacity
        survived_T[kept.assignment.token_ids_N] += 1
    fair = draws * capacity / tokens
    statistic = float(((survived_T - fair) ** 2 / fair).sum()) / (
        (1 - capacity / tokens) * tokens / (tokens - 1)
    )
    assert 1e-3 < stats.chi2.sf(statistic, tokens - 1) < 1 - 1e-3


def test_random_survival_differs_by_step_sample_and_expert() -> None:
    ctx = RouterContext.default(2, 16)
    routing = from_token_choice(torch.arange(2).repeat(32, 1), torch.ones(32, 2), ctx, 2)

    def survivors(ctx: RouterContext) -> list[list[int]]:
        kept = set(pairs(limit(routing, ctx, 0.5, "random")))
        return [
            [t - 16 * b for t in range(16 * b, 16 * b + 16) if (e, t) in kept] for b in (0, 1) for e in (0, 1)
        ]

    now = survivors(ctx)
    assert now == survivors(ctx)
    assert len({tuple(s) for s in now + survivors(replace(ctx, step=1))}) == 8


def test_dropped_assignments_have_no_gradient() -> None:
    ctx = RouterContext.default(2, 7)
    routing = full_routing(ctx, 3, 2, 0)
    weights_N = routing.assignment.weights_N.clone().requires_grad_()
    scale_N = torch.arange(28.0)
    before = reassigned(routing, weights_N=weights_N, forward_scale_N=scale_N)
    kept = limit(before, ctx, 0.5, "probability")
    kept.assignment.weights_N.sum().backward()
    alive_N = torch.tensor([pair in pairs(kept) for pair in pairs(before)])
    assert 0 < int(alive_N.sum()) < 28
    assert torch.equal(weights_N.grad, alive_N.double())
    assert torch.equal(kept.assignment.forward_scale_N, scale_N[alive_N])
