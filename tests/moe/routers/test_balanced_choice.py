"""What each router that balances by its choice promises: expert choice, BASE, Sinkhorn.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import SEEDS, assert_sigmoids, chosen, looking_at_logits, normal

from moetrain.moe import RouterContext


@given(SEEDS, st.sampled_from([1.0, 2.0, 2.5]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_expert_choice_equals_brute_force(seed, share, padded):
    num_experts, batch, seq = 5, 3, 14
    z_TE = normal(seed, batch * seq, num_experts)
    valid_T = normal(seed + 1, batch * seq) > -0.5 if padded else torch.ones(batch * seq, dtype=torch.bool)
    ctx = replace(RouterContext.default(batch, seq), valid_T=valid_T)
    routing = looking_at_logits("expert_choice", num_experts, experts_per_token=share)(z_TE, ctx)
    p_TE, wanted = z_TE.softmax(-1), set()
    for b, e in itertools.product(range(batch), range(num_experts)):
        tokens = [t for t in range(b * seq, (b + 1) * seq) if valid_T[t]]
        c = math.ceil(len(tokens) * share / num_experts)
        wanted |= {(e, t) for t in sorted(tokens, key=lambda t, e=e: (-p_TE[t, e], t))[:c]}
    found = set(
        zip(routing.assignment.expert_ids_N().tolist(), routing.assignment.token_ids_N.tolist(), strict=True)
    )
    assert found == wanted
    counts = [math.ceil(int(v.sum()) * share / num_experts) for v in valid_T.view(batch, seq)]
    assert routing.assignment.counts_E.tolist() == [sum(counts)] * num_experts


@given(SEEDS, st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_capped_expert_choice_is_stable(seed, cap):
    """No token has more than the cap, every expert is full, and no pair would both rather have each other."""
    num_experts, seq = 6, 24
    z_TE = normal(seed, seq, num_experts)
    router = looking_at_logits("expert_choice", num_experts, experts_per_token=1.0, max_experts=cap)
    mask_TE = chosen(router(z_TE, RouterContext.default(1, seq)), seq)
    p_TE = z_TE.softmax(-1)
    assert (mask_TE.sum(1) <= cap).all()
    assert (mask_TE.sum(0) == seq // num_experts).all()
    worst_E = p_TE.where(mask_TE, 2.0).amin(0)
    worst_T = p_TE.where(mask_TE, 2.0).amin(1)
    has_room_T = mask_TE.sum(1) < cap
    wants_T = has_room_T[:, None] | (p_TE > worst_T[:, None])
    assert not (~mask_TE & (p_TE > worst_E) & wants_T).any()


def test_expert_choice_is_not_causal_and_its_threshold_is():
    router = looking_at_logits("expert_choice", 3, experts_per_token=1.0)
    ctx = RouterContext.default(1, 12)
    one = normal(12, 12, 3)
    other = torch.cat([one[:-3], one[-3:] + torch.tensor([9.0, 0.0, 0.0])])
    assert not torch.equal(chosen(router(one, ctx), 12)[:9], chosen(router(other, ctx), 12)[:9])
    router.eval()
    assert router.eval_modes == ("threshold", "group")
    assert torch.equal(chosen(router(one, ctx), 12)[:9], chosen(router(other, ctx), 12)[:9])
    router.eval_mode = "group"
    assert not torch.equal(chosen(router(one, ctx), 12)[:9], chosen(router(other, ctx), 12)[:9])


def test_the_threshold_learns_to_take_as_many_tokens():
    """After training on one distribution it takes about as many tokens of it as the experts did."""
    router = looking_at_logits("expert_choice", 4, experts_per_token=2.0, threshold_decay=0.9)
    for step in range(60):
        routing = router(normal(step, 8 * 64, 4), RouterContext.default(8, 64))
        router.after_step(routing.stats)
    fresh = router.eval()(normal(999, 100 * 64, 4), RouterContext.default(100, 64))
    assert fresh.stats is None
    assert fresh.assignment.counts_E.double().div(6400).tolist() == pytest.approx([0.5] * 4, abs=0.03)


@pytest.mark.parametrize("solver", ["exact", "auction"])
@given(
    seed=SEEDS, lengths=st.lists(st.integers(0, 23), min_size=1, max_size=4), num_experts=st.integers(1, 7)
)
@settings(max_examples=25, deadline=None)
def test_base_gives_every_expert_the_same(solver, seed, lengths, num_experts):
    """Within each sequence, to one token; by scores that -inf and padding do not disturb."""
    batch, seq = len(lengths), 23
    valid_T = (torch.arange(seq) < torch.tensor(lengths)[:, None]).flatten()
    z_TE = normal(seed, batch * seq, num_experts)
    z_TE[::5] = float("-inf")
    router = looking_at_logits("base", num_experts, solver=solver)
    router.logits = lambda x: x
    routing = router(z_TE, replace(RouterContext.default(batch, seq), valid_T=valid_T))
    routing.check()
    for row_E, n in zip(routing.demand_BE, lengths, strict=True):
        assert row_E.sum() == n
        assert row_E.max() - row_E.min() <= 1
    finite = z_TE[routing.assignment.token_ids_N, routing.assignment.expert_ids_N()]
    assert_sigmoids(routing.assignment.weights_N, finite)


def test_base_in_evaluation_is_the_best_expert():
    z_TE = normal(13, 40, 5)
    routing = looking_at_logits("base", 5).eval()(z_TE, RouterContext.default(2, 20))
    best_T = z_TE.argmax(-1)
    assert torch.equal(chosen(routing, 40), torch.nn.functional.one_hot(best_T, 5).bool())


def test_base_groups_by_several_sequences():
    z_TE = torch.zeros(8, 4, dtype=torch.float64)
    z_TE[:4, 0] = z_TE[4:, 1] = 1.0
    one = looking_at_logits("base", 4)(z_TE, RouterContext.default(2, 4))
    assert one.demand_BE.tolist() == [[1] * 4] * 2
    both = looking_at_logits("base", 4, group="2")(z_TE, RouterContext.default(2, 4))
    assert both.demand_BE.tolist() != one.demand_BE.tolist()
    assert both.assignment.counts_E.tolist() == [2] * 4


def test_sinkhorn_balances_what_top_k_does_not():
    z_TE = normal(14, 256, 8) + torch.linspace(0, 3, 8)
    ctx = RouterContext.default(2, 128)
    router = looking_at_logits("sinkhorn", 8, top_k=1)
    balanced, plain = router(z_TE, ctx), looking_at_logits("sinkhorn", 8, top_k=1).eval()(z_TE, ctx)
    assert torch.equal(plain.assignment.counts_E, torch.bincount(z_TE.argmax(-1), minlength=8))
    assert balanced.assignment.counts_E.double().var() < 0.1 * plain.assignment.counts_E.double().var()
    assert_sigmoids(
        balanced.assignment.weights_N,
        z_TE[balanced.assignment.token_ids_N, balanced.assignment.expert_ids_N()],
    )


@given(SEEDS, st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_the_scores_of_a_group_of_one_token_decide(seed, top_k):
    """Its plan is even but for the last bits, which differ from layout to layout."""
    z_TE = normal(seed, 9, 6)
    router = looking_at_logits("sinkhorn", 6, top_k=top_k, group="1")
    ctx = RouterContext.default(9, 1)  # groups of one sequence, which is one token
    best_TE = torch.zeros(9, 6, dtype=torch.bool).scatter(1, z_TE.topk(top_k).indices, True)
    assert torch.equal(chosen(router(z_TE, ctx), 9), best_TE)
