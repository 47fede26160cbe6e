"""MoE++: experts without a network act where the token is, and the earlier layer's logits take part."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny
import torch
from balance_cases import balance_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import reassigned
from torch import Tensor

from moetrain.config.hydra.compose import compose_train
from moetrain.moe import MoELayer, RouterContext, Routing, build_router
from moetrain.moe.assign import apply_capacity
from moetrain.moe.balance import StepTotals
from moetrain.moe.options import DropOrder

D, FFN = 7, 5


def layer_of(**options: object) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(
        d_model=D, d_ff=11, num_experts=FFN, router="moepp", router_options=dict(options), block=4
    )
    return layer.double()


def expected(layer: MoELayer, x_TD: Tensor, routing: Routing) -> Tensor:
    """A loop over assignments."""
    y_TD = x_TD * 0
    kinds, zero = layer.router.zero_experts, layer.zero_experts
    for n, (t, e) in enumerate(
        zip(routing.assignment.token_ids_N, routing.assignment.expert_ids_N(), strict=True)
    ):
        x_D, weight = x_TD[t] * layer.router.input_scale, routing.assignment.weights_N[n]
        index = int(e) - FFN
        if index < 0:
            gate, up = (x_D @ layer.experts.w_gate_up_EDCF[e].flatten(1)).chunk(2)
            out_D = (torch.nn.functional.silu(gate) * up) @ layer.experts.w_down_EFD[e]
        elif index < kinds.zero:
            out_D = torch.zeros_like(x_D)
        elif index < kinds.zero + kinds.copy:
            out_D = x_D
        else:
            c = index - kinds.zero - kinds.copy
            a, b = (zero.mix_weight_KD[2 * c : 2 * c + 2] @ x_D).softmax(0)
            out_D = a * x_D + b * zero.constant_CD[c]
        y_TD = y_TD.index_add(0, t[None], (weight * out_D)[None])
    return y_TD


@settings(max_examples=25, deadline=None)
@given(
    kinds=st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3)),
    batch=st.integers(1, 3),
    seq=st.integers(0, 13),
    padded=st.booleans(),
    capacity=st.sampled_from([None, 1.4]),
    form=st.sampled_from(["paper", "released"]),
    seed=st.integers(0, 99),
)
def test_the_layer_equals_a_loop_over_assignments(kinds, batch, seq, padded, capacity, form, seed):
    zero, copy, constant = kinds
    layer = layer_of(
        num_zero=zero,
        num_copy=copy,
        num_constant=constant,
        capacity_factor=capacity,
        min_capacity=1,
        form=form,
    )
    draw = torch.Generator().manual_seed(seed)
    x_BSD = torch.randn(batch, seq, D, generator=draw, dtype=torch.float64).requires_grad_()
    ctx = RouterContext.default(batch, seq)
    if padded:
        ctx = replace(ctx, valid_T=torch.rand(batch * seq, generator=draw) < 0.6)
    y_BSD, routing = layer(x_BSD, ctx)
    routing.check()
    y_TD = expected(layer, x_BSD.view(-1, D), routing)
    torch.testing.assert_close(y_BSD.view(-1, D), y_TD, rtol=0, atol=1e-12)
    wanted = [x_BSD, *layer.parameters()]
    weight_TD = torch.randn(y_TD.shape, generator=draw, dtype=torch.float64)
    ours = torch.autograd.grad((y_BSD.view(-1, D) * weight_TD).sum(), wanted, retain_graph=True)
    theirs = torch.autograd.grad((y_TD * weight_TD).sum(), wanted, allow_unused=True)
    for p, a, b in zip(wanted, ours, theirs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(p) if b is None else b, rtol=0, atol=1e-10)


def test_only_feed_forward_assignments_get_rows():
    layer = layer_of()
    x_BSD = torch.randn(2, 31, D, dtype=torch.float64)
    assignment = layer.router(x_BSD.view(-1, D), RouterContext.default(2, 31)).assignment
    counts = assignment.counts_E
    assert counts[FFN:].sum() > 0
    (chunk,) = layer.dispatcher.dispatch(x_BSD.view(-1, D), assignment).arrivals()
    assert list(chunk.rows.segments.useful) == counts[:FFN].tolist()
    assert int((chunk.rows.ids_R >= 0).sum()) == int(counts[:FFN].sum())


def test_a_token_of_zero_and_copy_is_scaled():
    layer = layer_of(num_constant=0)
    with torch.no_grad():
        layer.router.weight_ED.zero_()
        layer.router.weight_ED[FFN:, 0] = 50.0  # the zero and the copy expert, alike
    x_BSD = torch.rand(1, 3, D, dtype=torch.float64) + 0.5
    y_BSD, routing = layer(x_BSD)
    assert routing.assignment.counts_E.tolist() == [0] * FFN + [3, 3]
    torch.testing.assert_close(y_BSD, x_BSD / 2)


@pytest.mark.parametrize("tau", [0.25, 0.75, 1.0])
def test_capacities_are_as_one_to_tau_and_add_up(tau):
    ffn, zero, tokens, gamma = 6, 4, 1200, 1.1
    router = build_router("moepp", d_model=D, num_experts=ffn, tau=tau)
    with torch.no_grad():
        router.weight_ED.zero_()
    ctx = RouterContext.default(1, tokens)
    routing = router(torch.randn(tokens, D), ctx)
    assignments = int(routing.demand_E.sum())
    # every expert is asked for far too often: each keeps its capacity exactly
    wanted = torch.full((1, ffn + zero), assignments // (ffn + zero))
    spread = routing_of(wanted[0] * 3, tokens, routing)
    kept_E = apply_capacity(
        replace(spread, demand_BE=wanted), ctx, gamma, 0, DropOrder.position, "sequence"
    ).assignment.counts_E.double()
    share = gamma * assignments / (tau * ffn + zero)
    assert kept_E.tolist() == [-(-round(tau * share, 6) // 1)] * ffn + [-(-round(share, 6) // 1)] * zero
    assert gamma * assignments <= kept_E.sum() < gamma * assignments + ffn + zero


@pytest.mark.parametrize("wanted", ["networks", "others"])
@pytest.mark.parametrize("form", ["paper", "released"])
def test_capacity_counts_tokens_or_assignments(form: str, wanted: str) -> None:
    """All tokens choose the same two experts: each keeps gamma eta / (tau FFN + ZC) of what is counted."""
    ffn, zero, tokens, gamma, tau = 6, 4, 1201, 1.1, 0.75
    router = build_router(
        "moepp", d_model=D, num_experts=ffn, tau=tau, form=form, capacity_factor=gamma, min_capacity=0
    )
    first = 0 if wanted == "networks" else ffn
    with torch.no_grad():
        router.weight_ED.zero_()
        router.weight_ED[first : first + 2] = 1.0
    x_TD, ctx = torch.rand(tokens, D) + 0.1, RouterContext.default(1, tokens)
    counted = tokens if form == "paper" else 2 * tokens
    capacity = math.ceil((tau if wanted == "networks" else 1.0) * gamma * counted / (tau * ffn + zero))
    found = router(x_TD, ctx).assignment.counts_E.tolist()
    assert found[first : first + 2] == [capacity] * 2
    assert sum(found) == 2 * capacity
    assert router.eval()(x_TD, ctx).assignment.counts_E.sum() == 2 * tokens


def test_the_released_weights_leave_zero_experts_out() -> None:
    router = build_router(
        "moepp", d_model=D, num_experts=FFN, num_zero=2, num_constant=1, top_k=3, form="released"
    ).double()
    with torch.no_grad():
        router.weight_ED.copy_(torch.randn(9, D, generator=torch.Generator().manual_seed(2)))
    x_TD = torch.randn(97, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    routing = router(x_TD, RouterContext.default(1, 97))
    rows: dict[int, dict[int, float]] = {t: {} for t in range(97)}
    for t, e, weight in zip(
        routing.assignment.token_ids_N.tolist(),
        routing.assignment.expert_ids_N().tolist(),
        routing.assignment.weights_N.tolist(),
        strict=True,
    ):
        rows[t][e] = weight
    seen = set()
    for t, row in rows.items():
        assert len(row) == 3
        score_E = torch.softmax(x_TD[t] @ router.weight_ED.t(), 0).tolist()
        rest = sum(score_E[e] for e in row if e not in (FFN, FFN + 1))
        seen.add(sum(e in (FFN, FFN + 1) for e in row))
        for e, weight in row.items():
            assert weight == pytest.approx(0.0 if e in (FFN, FFN + 1) else score_E[e] / rest, abs=1e-15)
    assert seen == {0, 1, 2}


def test_a_released_token_of_zero_experts_alone_has_no_output() -> None:
    layer = layer_of(num_zero=2, num_copy=1, form="released")
    with torch.no_grad():
        layer.router.weight_ED.zero_()
        layer.router.weight_ED[FFN : FFN + 2, 0] = 50.0
    x_BSD = (torch.rand(1, 3, D, dtype=torch.float64) + 0.5).requires_grad_()
    y_BSD, _ = layer(x_BSD)
    assert not y_BSD.any()
    y_BSD.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def routing_of(counts_E: Tensor, tokens: int, like: Routing) -> Routing:
    ids_N = torch.cat([torch.arange(int(n)) % tokens for n in counts_E])
    return reassigned(
        like, token_ids_N=ids_N, weights_N=torch.ones(len(ids_N)), counts_E=counts_E, choice_N=None
    )


def test_the_balance_loss_charges_tau_for_zero_experts():
    router = build_router("moepp", d_model=D, num_experts=FFN, tau=0.5).double()
    ctx = RouterContext.default(2, 23)
    routing = router(torch.randn(46, D, dtype=torch.float64), ctx)
    p_TE = routing.scores_TE
    f_E = routing.assignment.counts_E / routing.assignment.counts_E.sum()
    eta_E = torch.tensor([1.0] * FFN + [0.5] * 4, dtype=torch.float64)
    found = balance_loss(routing, "switch", "micro", StepTotals(46))
    torch.testing.assert_close(found, (FFN + 4) * (eta_E * f_E * p_TE.mean(0)).sum())


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_papers_loss_is_equation_7(top_k: int) -> None:
    """sum_i eta_i f_i P_i by a loop: f_i the tokens that select i, a token, and P_i the mean probability."""
    router = build_router("moepp", d_model=D, num_experts=FFN, tau=0.5, top_k=top_k).double()
    x_TD = torch.randn(46, D, dtype=torch.float64)
    routing = router(x_TD, RouterContext.default(2, 23))
    want = torch.zeros((), dtype=torch.float64)
    p_TE = (x_TD @ router.weight_ED.t()).softmax(-1)
    for expert in range(FFN + 4):
        selecting = sum(expert in row.topk(top_k).indices for row in p_TE.detach())
        eta = 1.0 if expert < FFN else 0.5
        want = want + eta * selecting / 46 * p_TE[:, expert].sum() / 46
    found = balance_loss(routing, "moepp", "micro", StepTotals(46))
    torch.testing.assert_close(found, want)
    (ours,), (theirs,) = (torch.autograd.grad(x, router.weight_ED, retain_graph=True) for x in (found, want))
    torch.testing.assert_close(ours, theirs)


def test_the_presets_are_the_two_forms() -> None:
    for name, form in (("moepp", "released"), ("moepp_paper", "paper")):
        cfg = compose_train([f"router={name}"])
        assert cfg.router.form.name == form
        assert cfg.router.capacity_factor == (None if form == "released" else 1.1)
        assert [(loss.name, loss.coef) for loss in cfg.balance.losses] == [("moepp", 0.01)]


def test_earlier_logits_take_part_and_pass_gradients_back():
    router = build_router("moepp", d_model=D, num_experts=FFN).double()
    x_TD, ctx = torch.randn(3, D, dtype=torch.float64), RouterContext.default(1, 3)
    first = router(x_TD, ctx)
    with torch.no_grad():
        router.residual_EE.normal_()
    before_TE = first.logits_TE.detach().requires_grad_()
    second = router(x_TD, replace(ctx, prev=replace(first, logits_TE=before_TE)))
    torch.testing.assert_close(
        second.logits_TE, x_TD @ router.weight_ED.t() + before_TE @ router.residual_EE.t()
    )
    assert torch.autograd.grad(second.logits_TE.sum(), before_TE)[0].abs().min() > 0
    alone = router(x_TD, ctx)  # no earlier layer: a zero gradient, not none
    assert not torch.autograd.grad(alone.logits_TE.sum(), router.residual_EE)[0].any()


@pytest.mark.parametrize("options", [{"num_zero": -1}, {"tau": 0.0}, {"tau": 1.5}, {"top_k": 10}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"router.{next(iter(options))}="):
        build_router("moepp", d_model=D, num_experts=FFN, **options)


@pytest.mark.usefixtures("training")
@pytest.mark.parametrize("balance", ["running", "aux_free"])
def test_controllers_follow_experts_of_every_kind(balance, corpus, tmp_path):
    assert tiny.train(corpus, tmp_path, "router=moepp", f"balance={balance}", "train.steps=2") == 0
