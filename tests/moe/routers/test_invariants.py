"""Every router keeps the invariants of a Routing, whatever comes: any T and E, ties, -inf, padding."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.moe import ROUTERS, Router, RouterContext, Routing, build_router

D = 5
NAMES = sorted(ROUTERS)
KINDS = ("random", "equal", "ties", "out", "one")


def disturbed(logits_TE: Tensor, kind: str, seed: int) -> Tensor:
    """Logits as they hardly come by themselves: all or many equal, many -inf, all on one expert."""
    draw = torch.Generator().manual_seed(seed)
    if kind == "equal":
        return logits_TE * 0
    if kind == "ties":
        return (2 * logits_TE).round()
    if kind == "out":
        out = torch.rand(logits_TE.shape, generator=draw) < 0.5
        return logits_TE.masked_fill(out, float("-inf"))
    if kind == "one":
        return logits_TE + 30 * torch.nn.functional.one_hot(torch.tensor(0), logits_TE.shape[1])
    return logits_TE


def router_of(name: str, num_experts: int, kind: str, seed: int, training: bool) -> Router:
    torch.manual_seed(seed)
    router = build_router(name, d_model=D, num_experts=num_experts).double().train(training)
    for parameter in router.parameters():
        if not parameter.any():  # what starts at zero, as trained
            torch.nn.init.normal_(parameter)
    if hasattr(router, "logits"):
        plain = router.logits
        router.logits = lambda x: disturbed(plain(x), kind, seed)
    return router


def context(batch: int, seq: int, seed: int, padded: bool) -> RouterContext:
    draw = torch.Generator().manual_seed(seed)
    valid_T = torch.rand(batch * seq, generator=draw) < 0.6 if padded else None
    ids_T = torch.randint(0, 99, (batch * seq,), generator=draw)
    return RouterContext(batch, seq, torch.arange(batch) + 7, ids_T, valid_T, seed=seed)


@pytest.mark.parametrize("name", NAMES)
@given(
    batch=st.integers(0, 4),
    seq=st.integers(0, 64),
    num_experts=st.sampled_from([1, 2, 3, 5, 6, 7, 8, 13, 16]),
    kind=st.sampled_from(KINDS),
    padded=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_invariants(name, batch, seq, num_experts, kind, padded, training, seed):
    router = router_of(name, num_experts, kind, seed, training)
    state = {key: value.clone() for key, value in router.state_dict().items()}
    x_TD = torch.randn(batch * seq, D, dtype=torch.float64, requires_grad=True)
    ctx = context(batch, seq, seed, padded)
    routing = router(x_TD, ctx)
    routing.check()
    assert routing.assignment.counts_E.equal(routing.demand_E)  # dropless without options
    assert routing.num_tokens == (ctx.valid_T.sum() if padded else batch * seq)
    assert routing.assignment.weights_N.dtype is torch.float64
    if routing.assignment.weights_N.requires_grad:
        routing.assignment.weights_N.sum().backward()
        for key, parameter in router.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), key
    assert all(router.state_dict()[key].equal(value) for key, value in state.items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("total", [256, 257])
def test_one_long_sequence(name, total):
    router = router_of(name, 7, "random", 3, True)
    router(torch.randn(total, D, dtype=torch.float64), context(1, total, 3, True)).check()


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name):
    """What stands in the padding has no say, neither in a choice nor in a weight."""
    router = router_of(name, 7, "random", 3, True)
    ctx = context(3, 11, 5, True)
    one_TD = torch.randn(33, D, dtype=torch.float64)
    other_TD = one_TD.where(ctx.valid_T[:, None], 9 * torch.randn(33, D, dtype=torch.float64))
    one, other = router(one_TD, ctx), router(other_TD, ctx)
    for field in ("token_ids_N", "weights_N", "counts_E"):
        assert getattr(one.assignment, field).equal(getattr(other.assignment, field)), field
    for field in ("demand_BE", "num_tokens_B"):
        assert getattr(one, field).equal(getattr(other, field)), field


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_is_routed_alike_in_any_batch(name):
    """Alone, or between others: groups are sequences, and noise follows the sample."""
    router = router_of(name, 7, "random", 3, True)
    x_BSD = torch.randn(3, 11, D, dtype=torch.float64)
    whole_ctx = context(3, 11, 5, True)
    whole = router(x_BSD.flatten(0, 1), whole_ctx)
    for b in range(3):
        rows = slice(11 * b, 11 * b + 11)
        ctx = RouterContext(
            1, 11, whole_ctx.sample_ids_B[b : b + 1], whole_ctx.token_ids_T[rows], whole_ctx.valid_T[rows], 5
        )
        alone = router(x_BSD[b], ctx)
        mine = torch.nonzero(whole.assignment.token_ids_N // 11 == b).squeeze(1)
        assert alone.assignment.token_ids_N.equal(whole.assignment.token_ids_N[mine] - 11 * b)
        assert alone.assignment.expert_ids_N().equal(whole.assignment.expert_ids_N()[mine])
        # Another number of rows may take another kernel: logits are sums of five products below 8 in sum, so
        # they differ by at most 2 * 5 * 8 * 2^-53, and no router makes more of a difference of its logits.
        assert torch.allclose(
            alone.assignment.weights_N, whole.assignment.weights_N[mine], rtol=0, atol=1e-14
        )


def through_weights(router: Router, ctx: RouterContext, names: tuple[str, ...], *values: Tensor) -> Tensor:
    x_TD, *parameters = values
    state = dict(zip(names, parameters, strict=True))
    routing: Routing = torch.func.functional_call(router, state, (x_TD, ctx))
    return routing.assignment.weights_N


# estimators; without a gradient; "stable" has a table of token ids, and a test with a small one
NOT_CHECKED = ("dynmoe", "hash", "random", "sparsemixer", "sparsemixer2", "stable", "straight_through")


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NOT_CHECKED])
def test_gradcheck(name):
    """Weights are differentiable where choices do not change; estimators have tests of their own.

    Sequences of several valid tokens: the balanced plan of a single one is the same for every expert.
    """
    router = router_of(name, 5, "random", 4, True)
    ctx = context(2, 7, 5, True)
    trained = {key: p.detach().clone() for key, p in router.named_parameters() if p.requires_grad}
    names = tuple(trained)
    values = [torch.randn(14, D, dtype=torch.float64), *trained.values()]
    function = functools.partial(through_weights, router, ctx, names)
    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in values])
