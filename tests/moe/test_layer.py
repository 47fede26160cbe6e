"""Properties of the whole layer: padding, determinism, recompute, its seams and its errors.

Shapes: B batch, S sequence, T = B S, D model, E experts, N assignments.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from moe_cases import reassigned
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from moetrain.moe import MoELayer, RouterContext, Routing

BACKENDS = ["loop", "cpu", pytest.param("torch", marks=pytest.mark.filterwarnings("ignore:experts backend"))]


def make(seed: int = 0, dtype: torch.dtype = torch.float64, **kwargs: Any) -> MoELayer:
    torch.manual_seed(seed)
    sizes = {"d_model": 5, "d_ff": 7, "num_experts": 11}
    return MoELayer(**{**sizes, **kwargs}).to(dtype)


def grads_of(layer: MoELayer, loss: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Every gradient by name; the layer's own are not accumulated."""
    names, leaves = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, [x, *leaves])
    return dict(zip(["x", *names], found, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("capacity", [None, 0.6])
def test_gradients_are_as_if_the_padding_were_cut_off(backend: str, capacity: float | None) -> None:
    options = {"capacity_factor": capacity, "min_capacity": 1, "top_k": 3}
    layer = make(backend=backend, router_options=options)
    x_BSD, g_BSD = torch.randn(2, 4, 7, 5, dtype=torch.float64).unbind()
    lengths = [7, 2, 0, 5]
    valid_BS = torch.arange(7) < torch.tensor(lengths)[:, None]
    ctx = replace(RouterContext.default(4, 7), valid_T=valid_BS.view(-1))
    x = x_BSD.clone().requires_grad_()
    y_BSD, routing = layer(x, ctx)
    assert not y_BSD[~valid_BS].any()
    assert routing.num_tokens_B.tolist() == lengths
    got = grads_of(layer, (y_BSD * g_BSD).sum(), x)
    assert not got["x"][~valid_BS].any()
    want = {name: torch.zeros_like(g) for name, g in got.items()}
    for b, length in enumerate(lengths):
        cut = x_BSD[b : b + 1, :length].clone().requires_grad_()
        y, _ = layer(cut)
        torch.testing.assert_close(y_BSD[b : b + 1, :length], y, rtol=0, atol=1e-12)
        for name, grad in grads_of(layer, (y * g_BSD[b : b + 1, :length]).sum(), cut).items():
            (want["x"][b, :length] if name == "x" else want[name]).add_(grad[0] if name == "x" else grad)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_shared_experts_treat_padding_as_any_dense_layer_does() -> None:
    layer = make(num_shared_experts=2)
    x_BSD = torch.randn(2, 3, 5, dtype=torch.float64)
    ctx = replace(RouterContext.default(2, 3), valid_T=torch.zeros(6, dtype=torch.bool))
    assert torch.equal(layer(x_BSD, ctx)[0], layer.shared(x_BSD))


def test_the_gate_scales_the_shared_experts_token_by_token() -> None:
    layer, ungated = (make(num_shared_experts=2, d_ff_shared=3, shared_gate=gate) for gate in (True, False))
    ungated.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "shared_gate_1D"})
    assert layer.shared.w_down_DF.shape == (5, 3)
    x_BSD = torch.randn(2, 3, 5, dtype=torch.float64)
    gate_BS1 = (x_BSD * layer.shared_gate_1D).sum(-1, keepdim=True).sigmoid()
    want = ungated(x_BSD)[0] + (gate_BS1 - 1) * ungated.shared(x_BSD)
    torch.testing.assert_close(layer(x_BSD)[0], want, rtol=0, atol=1e-12)


def test_gradcheck() -> None:
    options = {"num_shared_experts": 1, "d_ff_shared": 1, "shared_gate": True}
    layer = make(d_model=3, d_ff=2, num_experts=4, router_options={"score": "sigmoid"}, **options)
    names, leaves = zip(*layer.named_parameters(), strict=True)
    x_BSD = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(call, (x_BSD, *leaves))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_two_runs_are_bit_equal(backend: str) -> None:
    layer = make(dtype=torch.float32, d_model=64, d_ff=32, num_experts=3, backend=backend)
    x_BSD = torch.randn(3, 128, 64)

    def run() -> dict[str, Tensor]:
        x = x_BSD.clone().requires_grad_()
        y, routing = layer(x)
        return {
            "y": y.detach(),
            "w": routing.assignment.weights_N.detach(),
            **grads_of(layer, y.square().sum(), x),
        }

    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # one thread would hide a race
    try:
        runs = [run() for _ in range(2)]
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in runs[0])


@pytest.mark.parametrize(
    "options",
    [{}, {"jitter": 0.3}, {"capacity_factor": 0.5, "drop_order": "random", "min_capacity": 0, "jitter": 0.1}],
)
def test_recompute_is_bit_equal(options: dict[str, Any]) -> None:
    layer = make(dtype=torch.float32, router_options={"top_k": 3, **options}, num_shared_experts=1)
    ctx = replace(RouterContext.default(3, 7), seed=5, step=9, layer=2)
    x_BSD = torch.randn(3, 7, 5)

    def run(recompute: bool) -> tuple[dict[str, Tensor], Routing]:
        x = x_BSD.clone().requires_grad_()
        y, routing = checkpoint(layer, x, ctx, use_reentrant=False) if recompute else layer(x, ctx)
        loss = y.square().sum() + routing.scores_TE.square().sum() + routing.logits_TE.sum()
        return {"y": y.detach(), **grads_of(layer, loss, x)}, routing.detach()

    plain, routing = run(False)
    again, recomputed = run(True)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    for one, other in zip(tree_leaves(routing), tree_leaves(recomputed), strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{"top_k": 2}, {"top_k": 11, "renormalize": False}, {"top_k": 3, "score": "softmax_after"}]
)
def test_equal_experts_are_one_dense_network(backend: str, options: dict[str, Any]) -> None:
    layer = make(backend=backend, router_options=options)
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.copy_(weight[:1].expand_as(weight).clone())
    up_DP, down_FD = layer.experts.w_gate_up_EDCF[0].detach().flatten(1), layer.experts.w_down_EFD[0].detach()
    x_BSD = torch.randn(2, 3, 5, dtype=torch.float64)
    want = torch.stack([oracle.feed_forward(x, up_DP, down_FD, "swiglu") for x in x_BSD.view(-1, 5)])
    torch.testing.assert_close(layer(x_BSD)[0], want.view(2, 3, 5), rtol=0, atol=1e-12)


def test_tokens_are_independent_where_nothing_is_dropped() -> None:
    layer, x_BSD = make(), torch.randn(3, 7, 5, dtype=torch.float64)
    places = torch.randperm(21)
    permuted = layer(x_BSD.view(1, 21, 5)[:, places])[0]
    torch.testing.assert_close(permuted[0], layer(x_BSD)[0].view(21, 5)[places], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_scale_multiplies_values_and_no_gradients(backend: str) -> None:
    layer, x_TD = make(backend=backend), torch.randn(13, 5, dtype=torch.float64)
    g_TD = torch.randn(13, 5, dtype=torch.float64)

    def run(scale_N: Tensor | None) -> tuple[Tensor, dict[str, Tensor], Routing]:
        x = x_TD.clone().requires_grad_()
        routing = reassigned(layer.router(x, RouterContext.default(1, 13)), forward_scale_N=scale_N)
        work = layer.dispatcher.dispatch(x, routing.assignment)
        y = layer.dispatcher.combine(layer.experts(work), work)
        return y.detach(), grads_of(layer, (y * g_TD).sum(), x), routing

    _, plain_grads, routing = run(None)
    scale_N = torch.rand(26, dtype=torch.float64) * 3
    y_TD, grads, _ = run(scale_N)
    torch.testing.assert_close(grads, plain_grads, rtol=0, atol=1e-12)
    want = torch.zeros(13, 5, dtype=torch.float64)
    up, down = (w.detach() for w in layer.experts.parameters())
    for t, e, w, s in zip(
        routing.assignment.token_ids_N,
        routing.assignment.expert_ids_N(),
        routing.assignment.weights_N,
        scale_N,
        strict=True,
    ):
        want[t] += s * w.detach() * oracle.feed_forward(x_TD[t], up[e].flatten(1), down[e], "swiglu")
    torch.testing.assert_close(y_TD, want, rtol=0, atol=1e-12)


def test_router_and_shared_experts_may_read_other_inputs() -> None:
    layer = make(num_shared_experts=1)
    x, seen, shared = torch.randn(3, 2, 3, 5, dtype=torch.float64).unbind()
    y, routing = layer(x, router_input=seen, shared_input=shared)
    _, of_seen = layer(seen)
    assert torch.equal(routing.assignment.weights_N, of_seen.assignment.weights_N)
    assert torch.equal(routing.assignment.token_ids_N, of_seen.assignment.token_ids_N)
    own_routed = layer(x, router_input=seen)[0] - layer.shared(x)
    torch.testing.assert_close(y - layer.shared(shared), own_routed, rtol=0, atol=1e-12)


def test_forward_leaves_no_trace_in_the_layer() -> None:
    layer = make(router_options={"jitter": 0.1, "capacity_factor": 1.0}, num_shared_experts=1)
    before, attributes = (
        copy.deepcopy(layer.state_dict()),
        set(vars(layer.router)) | set(vars(layer.dispatcher)),
    )
    for training in (True, False):
        layer.train(training)
        layer(torch.randn(2, 3, 5, dtype=torch.float64))
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())
    assert set(vars(layer.router)) | set(vars(layer.dispatcher)) == attributes


def test_evaluation_has_its_own_capacity_and_no_jitter() -> None:
    options = {"capacity_factor": 0.2, "min_capacity": 0, "top_k": 1, "jitter": 0.5, "renormalize": False}
    layer, x = make(router_options=options), torch.randn(2, 22, 5, dtype=torch.float64)
    assert int(layer(x)[1].assignment.counts_E.sum()) < 44
    layer.eval()
    routing = layer(x)[1]
    assert int(routing.assignment.counts_E.sum()) == 44
    torch.testing.assert_close(routing.logits_TE, x.view(-1, 5) @ layer.router.weight_ED.T)
    layer.router.options = replace(layer.router.options, eval_capacity_factor=0.2)
    assert int(layer(x)[1].assignment.counts_E.sum()) < 44


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"router": "topkk"}, "did you mean 'topk'"),
        ({"activation": "swiglo"}, "unknown activation 'swiglo'; known: swiglu"),
        ({"backend": "tritn"}, "unknown experts backend 'tritn'; known: auto"),
        ({"block": 0}, "experts.block=0 must be 1 or more"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"shared_gate": True}, "is of shared experts, but model.num_shared_experts=0"),
        ({"d_ff_shared": 3}, "is of shared experts, but model.num_shared_experts=0"),
        ({"router_options": {"capacity_factor": -1.0}}, "router.capacity_factor=-1.0 must be above 0"),
        ({"router_options": {"min_capacity": -1}}, "router.min_capacity=-1"),
    ],
)
def test_a_layer_that_cannot_be_is_refused_when_it_is_built(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_a_context_of_another_shape_is_refused() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="ctx is of 3 x 2 tokens, but x has 2 x 3"):
        make()(x, RouterContext.default(3, 2))  # as many tokens, other sequences
