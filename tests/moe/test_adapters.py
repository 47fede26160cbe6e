"""Adapters as experts around one network: the layer against its equation, and what upcycling makes of it.

Shapes: B batch, S sequence, T = B S, D model, E experts, F hidden, P = 2F (gated) or F.
"""

import oracle
import pytest
import torch
from torch import Tensor
from upcycle_cases import SEED, build, config, dense_state, inputs, loaded, logits, relative, target, worst

from moetrain.errors import UserError
from moetrain.models.count import count_parameters
from moetrain.moe.adapters import AdapterLayer
from moetrain.moe.options import ExpertKind, RouterConfig
from moetrain.moe.routers.topk import TopKOptions
from moetrain.ops import dense_mlp as ops
from moetrain.ops.activations import ACTIVATIONS
from moetrain.upcycle import AdaptersOptions, CopyOptions, upcycle

KIND = {"kind": ExpertKind.adapters, "d_ff_expert": 5}


def adapter_layer(activation: str = "swiglu", top_k: int = 2, **options: object) -> AdapterLayer:
    torch.manual_seed(1)
    layer = AdapterLayer(
        7, 11, 3, 5, activation, router_options={"top_k": top_k, "renormalize": False}, **options
    )
    return layer.double()


def by_hand(layer: AdapterLayer, x_BSD: Tensor) -> Tensor:
    """h + the sum of g_e A_e(h), token by token, from the reference's formulas."""
    x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
    spec = oracle.Spec(top_k=layer.router.top_k, renormalize=False)
    up_EDCF, down_EFD = layer.experts.w_gate_up_EDCF, layer.experts.w_down_EFD
    weights = oracle.Weights(layer.router.weight_ED, up_EDCF, down_EFD)
    gate = [] if layer.w_gate_FD is None else [layer.w_gate_FD]
    network_DP = torch.cat([*gate, layer.w_up_FD]).t()
    rows = []
    for x_D in x_TD:
        h_D = oracle.feed_forward(x_D, network_DP, layer.w_down_DF.t(), layer.activation)
        y_D = h_D
        for e, g in oracle.route(x_D, weights, spec):
            y_D = y_D + g * oracle.feed_forward(h_D, up_EDCF[e].flatten(1), down_EFD[e], "gelu")
        rows.append(y_D)
    return torch.stack(rows).view_as(x_BSD)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_output_and_every_gradient_are_the_equations(activation: str, top_k: int) -> None:
    layer = adapter_layer(activation, top_k)
    x_BSD = inputs(7).requires_grad_()
    leaves = [x_BSD, *layer.parameters()]
    found, expected = layer(x_BSD)[0], by_hand(layer, x_BSD)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_rounds_and_tokens_that_are_none() -> None:
    layer, x_BSD = adapter_layer(), inputs(7)
    whole = layer(x_BSD)[0]
    layer.max_rows_per_rank = 7
    torch.testing.assert_close(layer(x_BSD)[0], whole, rtol=1e-12, atol=1e-12)
    assert layer(x_BSD[:, :0])[0].shape == (3, 0, 7)


def test_the_network_runs_once_a_token_whatever_k(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = ops.dense_mlp

    def counted(x: Tensor, *weights: object) -> Tensor:
        seen.append(x.shape[:-1].numel())
        return plain(x, *weights)

    monkeypatch.setattr("moetrain.moe.mlp.dense_mlp", counted)
    for top_k in (1, 5):
        adapter_layer(top_k=top_k)(inputs(7))
    assert seen == [33, 33]


def test_there_are_no_shared_experts_beside_the_network() -> None:
    with pytest.raises(ValueError, match="num_shared_experts=0"):
        adapter_layer(num_shared_experts=1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "router",
    [
        TopKOptions(top_k=2),
        TopKOptions(top_k=3, renormalize=False, capacity_factor=0.3),
        RouterConfig(name="expert_choice"),
    ],
)
def test_upcycling_keeps_the_function_whatever_the_router(activation: str, router: RouterConfig) -> None:
    goal = target(router, activation, **KIND)
    error, result = worst(goal, dense_state(activation), AdaptersOptions())
    assert error < 1e-12
    assert result.preserves
    up_EDCF = result.state["blocks.0.feed_forward.experts.w_gate_up_EDCF"]
    assert up_EDCF.shape == (8, 23, 1, 5)
    assert len(up_EDCF.unique(dim=0)) == 8


def test_the_decoder_as_a_whole() -> None:
    state, goal = dense_state(), target(first_dense=1, **KIND)
    result = upcycle(state, goal, AdaptersOptions(), SEED)
    dense = build(config(num_experts=0), TopKOptions())
    dense.load_state_dict(state)
    model = loaded(result, goal)
    assert relative(logits(model), logits(dense)) < 1e-12
    assert all(torch.equal(result.state[name], tensor) for name, tensor in state.items())
    counts = count_parameters(model)
    assert counts.dense == count_parameters(dense).dense
    assert counts.experts == 8 * 2 * 23 * 5


def test_adapters_start_without_moments_beside_the_network() -> None:
    state = dense_state()
    for name, weight in list(state.items()):
        state[f"optim.{name}.exp_avg"] = torch.ones_like(weight)
        state[f"optim.{name}.step"] = torch.tensor(3.0)
    goal = target(**KIND)
    result = upcycle(state, goal, AdaptersOptions(carry_optimizer=True), SEED).state
    start = "optim.blocks.1.feed_forward."
    for name in ("experts.w_gate_up_EDCF", "experts.w_down_EFD", "router.weight_ED"):
        assert result[f"{start}{name}.exp_avg"].shape == result[f"blocks.1.feed_forward.{name}"].shape
        assert not result[f"{start}{name}.exp_avg"].any()
        assert result[f"{start}{name}.step"] == 0
    assert result[f"{start}w_down_DF.exp_avg"].all()
    assert result[f"{start}w_down_DF.step"] == 3


def test_methods_and_kinds_that_do_not_go_together() -> None:
    with pytest.raises(UserError, match=r"method=adapters makes experts\.kind=adapters, not networks"):
        upcycle(dense_state(), target(), AdaptersOptions(), SEED)
    with pytest.raises(UserError, match=r"method=copy makes experts\.kind=networks, not adapters"):
        upcycle(dense_state(), target(**KIND), CopyOptions(), SEED)
