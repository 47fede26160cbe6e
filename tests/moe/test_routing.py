"""The Routing value and the context's noise.

Shapes: T tokens, E experts, N assignments, B sequences.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import oracle
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils import _pytree as pytree

from moetrain.moe import RouterContext, Routing, build_router
from moetrain.moe.assign import count, from_token_choice, stable_order
from moetrain.moe.assignment import Assignment
from moetrain.moe.dispatch.plan import layout


def routing() -> Routing:
    """Five tokens of two sequences, four experts; expert 1 is empty, token 3 is padding."""
    return Routing(
        assignment=Assignment(
            token_ids_N=torch.tensor([0, 2, 4, 1, 2]),
            weights_N=torch.tensor([0.5, 0.25, 1.0, 0.5, 0.75]),
            counts_E=torch.tensor([3, 0, 1, 1]),
        ),
        num_tokens_B=torch.tensor([3, 1]),
        demand_BE=torch.tensor([[2, 0, 1, 1], [1, 0, 0, 0]]),
        valid_T=torch.tensor([True, True, True, False, True]),
    )


def test_a_good_routing_passes() -> None:
    r = routing()
    r.check()
    assert r.assignment.expert_ids_N().tolist() == [0, 0, 0, 2, 3]
    assert (r.num_experts, int(r.num_tokens), r.demand_E.tolist()) == (4, 4, [3, 0, 1, 1])


def changed(routing: Routing, **change: Tensor) -> Routing:
    """The routing with another value of a field, or of its assignment's."""
    ((name, value),) = change.items()
    if "." not in name:
        return replace(routing, **{name: value})
    return replace(routing, assignment=replace(routing.assignment, **{name.partition(".")[2]: value}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"assignment.counts_E": torch.tensor([3, 0, 1, 0])},
            "counts_E sums to 4, but there are 5",
        ),
        ({"assignment.weights_N": torch.ones(5, 1)}, r"weights_N has shape \(5, 1\), expected \(5,\)"),
        (
            {"assignment.weights_N": torch.ones(5).bfloat16()},
            "weights_N is torch.bfloat16, expected fp32",
        ),
        ({"demand_BE": torch.ones(4, 4).long()}, r"demand_BE has shape \(4, 4\)"),
        ({"demand_BE": torch.tensor([[2, 0, 1, 1], [0, 0, 0, 0]])}, "more assignments than its demand"),
        ({"assignment.token_ids_N": torch.tensor([2, 0, 4, 1, 2])}, "not sorted"),
        ({"assignment.token_ids_N": torch.tensor([0, 2, 2, 1, 2])}, "or one occurs twice"),
        ({"assignment.token_ids_N": torch.tensor([0, 2, 3, 1, 2])}, "a padding token is assigned"),
    ],
)
def test_broken_invariants_are_named(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(routing(), **change).check()


def test_it_is_immutable_and_a_pytree() -> None:
    r = routing()
    with pytest.raises(FrozenInstanceError):
        r.assignment.counts_E = r.assignment.counts_E  # type: ignore[misc]
    leaves, structure = pytree.tree_flatten(r)
    again = pytree.tree_unflatten(leaves, structure)
    assert isinstance(again, Routing)
    record = [f.name for f in fields(Routing) if f.name != "assignment"]
    assert all(getattr(again, name) is getattr(r, name) for name in record)
    names = [f.name for f in fields(Assignment)]
    assert all(getattr(again.assignment, name) is getattr(r.assignment, name) for name in names)
    doubled = pytree.tree_map(lambda t: t * 2 if isinstance(t, Tensor) and t.is_floating_point() else t, r)
    assert torch.equal(doubled.assignment.weights_N, r.assignment.weights_N * 2)
    assert doubled.scores_TE is None


def test_detach_cuts_every_field_from_the_graph() -> None:
    router = build_router("topk", d_model=3, num_experts=5)
    live = router(torch.randn(6, 3), RouterContext.default(2, 3))
    assert live.assignment.weights_N.requires_grad
    assert live.scores_TE.requires_grad
    cut = live.detach()
    for one, other in zip(pytree.tree_leaves(live), pytree.tree_leaves(cut), strict=True):
        assert (one is None) == (other is None)
        assert other is None or (not other.requires_grad and torch.equal(one, other))


def context(**changes: Any) -> RouterContext:
    ctx = RouterContext(3, 4, torch.tensor([5, 2**40, 0]), seed=-3, step=10**9, layer=2)
    return replace(ctx, **changes)


def test_noise_equals_the_integer_arithmetic_of_its_definition() -> None:
    ctx = context()
    for columns in (None, 5):
        got = ctx.uniform((12,) if columns is None else (12, columns), salt=77)
        assert got.dtype == torch.float32
        for b, sample in enumerate(ctx.sample_ids_B.tolist()):
            for s in range(4):
                for c in [None] if columns is None else range(columns):
                    want = oracle.uniform(-3, 10**9, 2, 77, sample, s, c)
                    assert float(got[4 * b + s] if c is None else got[4 * b + s, c]) == want


def test_noise_is_uniform_and_unlike_for_each_part_of_its_key() -> None:
    ctx = RouterContext(64, 32, torch.arange(64), seed=1)
    draws = [ctx.uniform((2048, 4))] + [
        replace(ctx, **change).uniform((2048, 4), salt)
        for change, salt in [
            ({"seed": 2}, 0), ({"step": 1}, 0), ({"layer": 1}, 0), ({}, 1),
            ({"sample_ids_B": torch.arange(64) + 64}, 0),
        ]
    ]  # fmt: skip
    for u in draws:
        assert 0 < float(u.min()) < 0.001
        assert 0.999 < float(u.max()) < 1
        assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    one = draws[0].view(64, 32, 4)
    pairs = [(a, b) for i, a in enumerate(draws) for b in draws[:i]]
    pairs += [(one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one[..., 1:], one[..., :-1])]
    for a, b in pairs:  # other keys, neighbouring samples, positions and columns
        both = torch.stack([a.flatten(), b.flatten()]).double()
        assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / both.shape[1] ** 0.5


def test_noise_wants_one_row_a_token() -> None:
    with pytest.raises(ValueError, match="uniform needs one row a token: 12, not 11"):
        context().uniform((11, 2))


def test_contexts_move_on_by_value() -> None:
    ctx, prev = context(), routing()
    moved = ctx.at_layer(7, prev)
    assert (moved.layer, moved.prev, ctx.layer, ctx.prev) == (7, prev, 2, None)
    assert ctx.positions_T.tolist() == [0, 1, 2, 3] * 3
    assert ctx.sequence_ids_T.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    "keys", [[], [4], [0] * 7, [6, 0, 2, 2, 6, 6, 1]], ids=["none", "one", "skew", "some"]
)
def test_counts_of_keys_are_those_of_bincount(keys: list[int]) -> None:
    keys_M = torch.tensor(keys, dtype=torch.int64)
    assert torch.equal(count(keys_M, 7), torch.bincount(keys_M, minlength=7))


@pytest.mark.parametrize("num_keys", [1, 2, 2**15 - 1, 2**15, 2**15 + 1, 70_000])
def test_stable_order_at_the_edge_of_16_bits(num_keys: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(num_keys, (2000,), generator=generator)
    keys[::3] = num_keys - 1
    want = sorted(range(2000), key=lambda i: (int(keys[i]), i))
    assert stable_order(keys, num_keys).tolist() == want


def test_a_layers_worth_of_tokens_beyond_16_bits() -> None:
    """Token numbers above 2^15 go through the same sorts as small ones."""
    ctx = RouterContext.default(3, 11_003)
    ids_TK = torch.randint(7, (33_009, 1), generator=torch.Generator().manual_seed(0))
    r = from_token_choice(ids_TK, torch.arange(33_009.0)[:, None], ctx, 7)
    r.check()
    assert torch.equal(r.assignment.weights_N.long(), r.assignment.token_ids_N)
    assert torch.equal(ids_TK[r.assignment.token_ids_N, 0], r.assignment.expert_ids_N())
    rows, slots_N = layout(
        r.assignment.token_ids_N, r.assignment.counts_E, r.assignment.counts_E.tolist(), 33_009, 32
    )
    assert torch.equal(rows.ids_R[slots_N], r.assignment.token_ids_N)
    assert torch.equal(rows.ids_R[rows.by_source_N], torch.arange(33_009))
