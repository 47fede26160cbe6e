"""Optimizer state follows its weights: compared with gradients, of which moments are averages.

Shapes: E experts, M matrices, D model, F hidden.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from upcycle_cases import (
    SEED,
    State,
    build,
    config,
    dense_layer,
    dense_matrices,
    dense_state,
    gate_up_down,
    inputs,
    loaded,
    target,
)

from moetrain.checkpoint.state_dict import optimizer_tensors
from moetrain.errors import UserError
from moetrain.moe.routers.topk import TopKOptions
from moetrain.upcycle import (
    CopyOptions,
    DropOptions,
    GranularOptions,
    GrowOptions,
    JoinOptions,
    LayerCalibration,
    MethodOptions,
    Rest,
    ScaleOn,
    SplitOptions,
    upcycle,
)

FF = "blocks.1.feed_forward."
SLICES = {"d_ff": 39, "d_ff_expert": 13}


def with_optimizer(state: State, seed: int = 7, steps: float = 11.0) -> State:
    """The state, and AdamW's of every parameter, at random."""
    generator = torch.Generator().manual_seed(seed)
    found = dict(state)
    for name, weight in state.items():
        if not name.endswith("bias_E"):
            found[f"optim.{name}.exp_avg"] = torch.randn(weight.shape, generator=generator).double()
            found[f"optim.{name}.exp_avg_sq"] = torch.rand(weight.shape, generator=generator).double()
            found[f"optim.{name}.step"] = torch.tensor(steps)
    return found


def moments(state: State, key: str) -> State:
    """The state of one key under its parameters' own names."""
    start, end = "optim.", f".{key}"
    return {n.removeprefix(start).removesuffix(end): t for n, t in state.items() if n.endswith(end)}


def carried(options: MethodOptions, state: State, **more: Any) -> State:
    sizes = {name: more.pop(name) for name in list(more) if name not in ("calibration", "donors", "router")}
    goal = target(more.pop("router", None), **sizes)
    result = upcycle(state, goal, options, SEED, **more)
    assert not result.dropped
    return result.state


def test_every_parameter_has_the_state_that_adamw_would_make() -> None:
    goal = target(num_experts=3, first_dense=1)
    state = with_optimizer(dense_state())
    result = upcycle(state, goal, CopyOptions(carry_optimizer=True), SEED)
    model = build(goal.model, goal.router)
    expected = optimizer_tensors(model, torch.optim.AdamW(model.parameters()))
    found = {name: t for name, t in result.state.items() if name.startswith("optim.")}
    assert found.keys() == expected.keys()
    assert all(found[name].shape == tensor.shape for name, tensor in expected.items())
    assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())


def test_copies_have_the_dense_moments_and_routers_none() -> None:
    state = with_optimizer(dense_state())
    result = carried(CopyOptions(carry_optimizer=True), state)
    for key in ("exp_avg", "exp_avg_sq"):
        dense, new = moments(state, key), moments(result, key)
        for expert, old in zip(gate_up_down(new, 1, 2), dense_matrices(dense, 1, 2), strict=True):
            assert torch.equal(expert, old.expand_as(expert))
        assert not new[FF + "router.weight_ED"].any()
        assert torch.equal(new["embed_VD"], dense["embed_VD"])
    steps = moments(result, "step")
    assert steps.pop(FF + "router.weight_ED") == 0
    assert steps.pop("blocks.0.feed_forward.router.weight_ED") == 0
    assert set(map(float, steps.values())) == {11.0}


def gradients(module: torch.nn.Module, x_BSD: Tensor) -> dict[str, Tensor]:
    out = module(x_BSD)
    (out[0] if isinstance(out, tuple) else out).square().sum().backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("activation", "scale_on"),
    [("swiglu", ScaleOn.down), ("gelu", ScaleOn.down), ("reglu", ScaleOn.all), ("relu2", ScaleOn.all)],
)
def test_moments_of_scaled_weights_are_those_of_their_gradients(activation: str, scale_on: ScaleOn) -> None:
    """One virtual group, which every token takes whole: gradients are the dense ones over the factor."""
    state, x_BSD = dense_state(activation, **SLICES), inputs(23)
    for name, gradient in gradients(dense_layer(state, 1, activation), x_BSD).items():
        for layer in (0, 1):
            start = f"optim.blocks.{layer}.feed_forward.{name}."
            state |= {start + "exp_avg": gradient, start + "exp_avg_sq": gradient.square()}
    goal = target(TopKOptions(top_k=3), activation, num_experts=3, **SLICES)
    options = GranularOptions(scale_on=scale_on, carry_optimizer=True)
    result = upcycle(state, goal, options, SEED).state
    weights = {name: t for name, t in result.items() if not name.startswith("optim.")}
    model = build(goal.model, goal.router, activation)
    model.load_state_dict(weights)
    found = gradients(model.blocks[1].feed_forward, x_BSD)
    for name in ("experts.w_gate_up_EDCF", "experts.w_down_EFD"):
        first, second = (moments(result, key)[FF + name] for key in ("exp_avg", "exp_avg_sq"))
        torch.testing.assert_close(first, found[name], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(second, found[name].square(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("independent", [False, True])
def test_what_is_drawn_anew_has_no_moments(independent: bool) -> None:
    state = with_optimizer(dense_state())
    options = DropOptions(carry_optimizer=True, drop_ratio=0.4, independent_sets=independent)
    result = carried(options, state)
    first, second = moments(result, "exp_avg"), moments(result, "exp_avg_sq")
    old = dense_matrices(moments(state, "exp_avg"), 1, 2)
    weights = dense_matrices(state, 1, 2)
    for m, expert_EFD in enumerate(gate_up_down(result, 1, 2)):
        for e, expert_FD in enumerate(expert_EFD):
            for f, row_D in enumerate(expert_FD):
                from_F = (weights[m] == row_D).all(-1)
                expected = old[m][from_F][0] if from_F.any() else torch.zeros(23).double()
                assert torch.equal(gate_up_down(first, 1, 2)[m][e, f], expected)
                assert bool(gate_up_down(second, 1, 2)[m][e, f].any()) is bool(from_F.any())


@pytest.mark.parametrize("gated", [False, True])
def test_a_shared_experts_moments_are_scaled_where_it_is(gated: bool) -> None:
    state = with_optimizer(dense_state(d_ff=35))
    sizes = {"d_ff": 35, "d_ff_expert": 5, "num_experts": 5, "num_shared_experts": 2, "shared_gate": gated}
    hidden = torch.randn(7, 35, generator=torch.Generator().manual_seed(1))
    calibration = {layer: LayerCalibration(hidden_TF=hidden) for layer in (0, 1)}
    result = carried(SplitOptions(carry_optimizer=True), state, calibration=calibration, **sizes)
    for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        new, old = moments(result, key), moments(state, key)[FF + "w_down_DF"]
        shared = new[FF + "shared.w_down_DF"]
        strongest = hidden.abs().mean(0).topk(10).indices.sort().values
        shared = shared * (2**power if gated else 1)
        assert torch.equal(shared, old[:, strongest])
        if gated:
            assert not new[FF + "shared_gate_1D"].any()
        rest = new[FF + "experts.w_down_EFD"].sum() * 5**power
        torch.testing.assert_close(rest + shared.sum(), old.sum())
    assert moments(result, "step")[FF + "shared.w_up_FD"] == 11


def test_gate_and_up_of_other_step_counts_are_refused() -> None:
    """They become one parameter, which has one count."""
    state = with_optimizer(dense_state())
    name = f"optim.{FF}w_gate_FD.step"
    state[name] = state[name] + 1
    with pytest.raises(UserError, match=r"w_gate_FD has made 12\.0 steps and .*w_up_FD 11\.0, but they"):
        carried(CopyOptions(carry_optimizer=True), state)


def test_joined_models_bring_their_own() -> None:
    first, second = (with_optimizer(dense_state(seed=seed), seed) for seed in (0, 1))
    options = JoinOptions(carry_optimizer=True, rest=Rest.mean)
    result = carried(options, first, donors=[second], num_experts=4)
    new = gate_up_down(moments(result, "exp_avg"), 1, 2)[2]
    for e, state in enumerate((first, first, second, second)):
        assert torch.equal(new[e], dense_matrices(moments(state, "exp_avg"), 1, 2)[2])
    name = "optim.embed_VD.exp_avg_sq"
    torch.testing.assert_close(result[name], (first[name] + second[name]) / 2)
    late = with_optimizer(dense_state(seed=1), steps=13.0)
    with pytest.raises(UserError, match=r"step is 11\.0 in the first model and 13\.0 in donor 1"):
        carried(options, first, donors=[late], num_experts=4)


def test_grown_experts_and_router_rows_bring_theirs() -> None:
    torch.manual_seed(1)
    small = build(config(num_experts=4, d_ff_expert=13), TopKOptions())
    state = with_optimizer(small.state_dict())
    sizes = {"num_experts": 8, "d_ff_expert": 13}
    result = carried(GrowOptions(carry_optimizer=True), state, **sizes)
    for key in ("exp_avg", "exp_avg_sq"):
        for name in ("experts.w_down_EFD", "experts.w_gate_up_EDCF", "router.weight_ED"):
            old, new = moments(state, key)[FF + name], moments(result, key)[FF + name]
            assert torch.equal(new, old.repeat_interleave(2, 0))
    assert moments(result, "step")[FF + "router.weight_ED"] == 11


def test_muons_momentum_goes_with_its_weights() -> None:
    state = dense_state()
    for layer in (0, 1):
        for name in ("w_gate_FD", "w_up_FD", "w_down_DF"):
            weight = f"blocks.{layer}.feed_forward.{name}"
            state[f"optim.{weight}.momentum"] = 3 * state[weight]
    state["optim.embed_VD.exp_avg"] = torch.ones_like(state["embed_VD"])
    result = carried(CopyOptions(carry_optimizer=True), state)
    momentum = result[f"optim.{FF}experts.w_down_EFD.momentum"]
    torch.testing.assert_close(momentum, 3 * result[FF + "experts.w_down_EFD"])
    assert not result[f"optim.{FF}router.weight_ED.exp_avg"].any()


def test_state_is_left_behind_unless_it_is_asked_for() -> None:
    state = with_optimizer(dense_state())
    goal = target()
    result = upcycle(state, goal, CopyOptions(), SEED)
    assert result.dropped == sorted(name for name in state if name.startswith("optim."))
    loaded(result, goal)


def test_state_that_is_missing_or_strange() -> None:
    state, options = dense_state(), CopyOptions(carry_optimizer=True)
    with pytest.raises(UserError, match="holds no optimizer state"):
        carried(options, state)
    full = with_optimizer(state)
    with pytest.raises(UserError, match=r"optim\.elsewhere\.exp_avg belongs to no parameter"):
        carried(options, {**full, "optim.elsewhere.exp_avg": torch.zeros(3)})
    strange = {n.replace("exp_avg_sq", "max_exp_avg_sq"): t for n, t in full.items()}
    with pytest.raises(UserError, match=r"'max_exp_avg_sq' of blocks\.0.* is not known"):
        carried(options, strange)
    del full[f"optim.{FF}w_down_DF.exp_avg"]
    with pytest.raises(UserError, match="different optimizer state"):
        carried(options, full)
