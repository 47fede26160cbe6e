"""bf16 autocast: routing stays fp32, products lose what bf16 must lose and no more.

Shapes: T tokens, D model, E experts, F hidden, K top-k.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moetrain.moe import MoELayer

D, F, E, K = 24, 40, 5, 2
U = 2.0**-8  # bf16's unit roundoff: 8 significant bits, round to nearest


def make(backend: str) -> tuple[MoELayer, Tensor, Tensor]:
    torch.manual_seed(3)
    layer = MoELayer(D, F, E, backend=backend, router_options={"top_k": K})
    return layer, torch.randn(3, 7, D), torch.randn(3, 7, D)


def run(layer: MoELayer, x: Tensor, g: Tensor, autocast: bool) -> dict[str, Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, routing = layer(x)
    (y.to(g.dtype) * g).sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return {
        "y": y.detach(),
        "logits": routing.logits_TE,
        "weights": routing.assignment.weights_N,
        "x": x.grad,
        **grads,
    }


@pytest.mark.parametrize("backend", ["loop", "cpu", "torch"])
def test_routing_is_fp32_under_autocast(backend: str) -> None:
    layer, x, g = make(backend)
    plain, cast = run(layer, x, g, False), run(layer, x, g, True)
    for name in ("logits", "weights"):
        assert cast[name].dtype == torch.float32
        assert torch.equal(cast[name], plain[name])
    assert cast["y"].dtype == torch.bfloat16
    for name in ("router.weight_ED", "experts.w_gate_up_EDCF", "experts.w_down_EFD", "x"):
        assert cast[name].dtype == torch.float32


@pytest.mark.parametrize("backend", ["loop", "cpu", "torch"])
def test_a_bf16_model_routes_in_fp32_too(backend: str) -> None:
    layer, x, _ = make(backend)
    y, routing = layer.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert (
        routing.logits_TE.dtype
        == routing.assignment.weights_N.dtype
        == routing.scores_TE.dtype
        == torch.float32
    )
    want = x.to(torch.bfloat16).double().view(-1, D) @ layer.router.weight_ED.double().T
    torch.testing.assert_close(routing.logits_TE.double(), want, rtol=1e-5, atol=1e-5)


def bound(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """A running error bound of y in bf16, to first order in U, from the exact values' magnitudes.

    Rounded: both operands of each product, each product's result, the gate's activation, its product with
    up, the routing weight, its product with the hidden row, and the sum over a token's experts. |silu'| < 1.1
    and sums are fp32, so their own error is far below U.
    """
    layer = layer.double()
    up, down = layer.experts.w_gate_up_EDCF.detach().flatten(2), layer.experts.w_down_EFD.detach()
    y_TD = torch.zeros_like(x_TD)
    error_TD = torch.zeros_like(x_TD)
    routing = layer(x_TD[None])[1]
    for t, e, w in zip(
        routing.assignment.token_ids_N,
        routing.assignment.expert_ids_N(),
        routing.assignment.weights_N.detach(),
        strict=True,
    ):
        gate, value = (x_TD[t] @ up[e]).chunk(2)
        dgate, dvalue = (3 * U * (x_TD[t].abs() @ up[e].abs())).chunk(2)
        act = torch.nn.functional.silu(gate)
        dact = 1.1 * dgate + U * act.abs()
        hidden = act * value
        dhidden = dact * value.abs() + act.abs() * dvalue + dact * dvalue + U * hidden.abs()
        dhidden = w * (dhidden + 2 * U * hidden.abs())
        out = w * hidden @ down[e]
        error_TD[t] += (dhidden + U * w * hidden.abs()) @ down[e].abs() + U * out.abs()
        y_TD[t] += out
    return error_TD + U * y_TD.abs()


@pytest.mark.filterwarnings("ignore:experts backend torch")  # the reference is fp64
@pytest.mark.parametrize("backend", ["loop", "cpu", "torch"])
def test_bf16_stays_within_its_own_arithmetic(backend: str) -> None:
    layer, x, g = make(backend)
    got = {name: t.double() for name, t in run(layer, x, g, True).items()}
    limit_TD = bound(layer, x.double().view(-1, D))
    want = run(layer.double(), x.double(), g.double(), False)
    error_TD = (got["y"] - want["y"]).abs().view(-1, D)
    assert (error_TD <= 1.05 * limit_TD).all()  # 1.05: second-order terms
    # Roundings are independent, so norms lose about U; half a dozen of them in a row stay under 4 U.
    for name in ("y", "x", "router.weight_ED", "experts.w_gate_up_EDCF", "experts.w_down_EFD"):
        loss = (got[name] - want[name]).norm() / want[name].norm()
        assert loss < 4 * U, name
        assert loss > U / 64, f"{name}: this was not bf16"
