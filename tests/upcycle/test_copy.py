"""Copies of the dense network: the function is kept, layers and random draws are where they should be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from upcycle_cases import (
    SEED,
    build,
    config,
    dense_matrices,
    dense_state,
    gate_up_down,
    inputs,
    loaded,
    logits,
    relative,
    target,
    worst,
)

from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.gshard import GShardOptions
from moetrain.moe.routers.noisy_topk import NoisyTopKOptions
from moetrain.moe.routers.sigmoid import SigmoidOptions
from moetrain.moe.routers.topk import Score, TopKOptions
from moetrain.ops.activations import ACTIVATIONS
from moetrain.upcycle import CopyOptions, LayerCalibration, RouterStart, prepare, upcycle

PATTERNS = [{}, {"moe_every": 2}, {"first_dense": 3}, {"first_dense": 1, "moe_every": 3}]


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_are_the_dense_models(top_k: int, pattern: dict[str, int]) -> None:
    """Every second layer, the last half, all layers; the other layers pass as they are."""
    state = dense_state(num_layers=6)
    goal = target(TopKOptions(top_k=top_k), num_layers=6, **pattern)
    result = upcycle(state, goal, CopyOptions(), SEED)
    dense = build(config(num_layers=6, num_experts=0), TopKOptions())
    dense.load_state_dict(state)
    model = loaded(result, goal)
    assert list(model.moe_layers()) == goal.layers
    assert relative(logits(model), logits(dense)) < 1e-12
    assert (result.preserves, result.dropped) == (True, [])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    error, result = worst(target(activation=activation), dense_state(activation), CopyOptions())
    assert error < 1e-12
    assert result.preserves


ROUTERS = [
    (TopKOptions(top_k=3, score=Score.softmax_after), True),
    (SigmoidOptions(top_k=3), True),
    (NoisyTopKOptions(top_k=3), True),
    (RouterConfig(name="random"), True),
    (TopKOptions(top_k=8, renormalize=False), True),
    (TopKOptions(top_k=3, renormalize=False), False),
    (TopKOptions(top_k=3, route_scale=2.5), False),
    (TopKOptions(top_k=3, capacity_factor=0.1, min_capacity=0, group="3"), False),
    (RouterConfig(name="switch"), False),
    (RouterConfig(name="sigma"), False),
]


@pytest.mark.parametrize(("router", "kept"), ROUTERS)
def test_what_is_promised_is_what_happens(router: RouterConfig, kept: bool) -> None:
    error, result = worst(target(router), dense_state(), CopyOptions())
    assert (error < 1e-12) is kept
    assert result.preserves is kept
    assert result.reason


def test_a_router_that_drops_by_chance_is_promised_nothing() -> None:
    assert not upcycle(dense_state(), target(GShardOptions()), CopyOptions(), SEED).preserves


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_experts_are_the_dense_tensors_bit_for_bit(dtype: torch.dtype) -> None:
    state = {name: t.to(dtype) for name, t in dense_state().items()}
    result = upcycle(state, target(), CopyOptions(), SEED).state
    for layer in (0, 1):
        for expert, dense in zip(
            gate_up_down(result, layer, 2), dense_matrices(state, layer, 2), strict=True
        ):
            assert torch.equal(expert, dense.expand_as(expert))
        start = f"blocks.{layer}.feed_forward.router."
        assert result[start + "weight_ED"].dtype is dtype
        assert result[start + "bias_E"].dtype is torch.float32
        assert not result[start + "bias_E"].any()


def test_the_seed_decides_and_no_order_does() -> None:
    state, goal = dense_state(), target()
    options = CopyOptions(noise_std=0.1)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = upcycle(state, goal, options, SEED).state
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(12)
    backwards = prepare(dict(reversed(state.items())), goal, options, SEED)
    again = dict(pair for layer in (1, 0) for pair in backwards.layer(layer))
    assert all(torch.equal(first[name], tensor) for name, tensor in again.items())
    other = upcycle(state, goal, options, SEED + 1).state
    for name in ("router.weight_ED", "experts.w_down_EFD", "experts.w_gate_up_EDCF"):
        here, there = (f"blocks.{layer}.feed_forward.{name}" for layer in (0, 1))
        assert not torch.equal(first[here], other[here])
        assert not torch.equal(first[here], first[there])


def test_the_order_of_other_layers_does_not_matter_to_one() -> None:
    """A layer draws the same whether the layers before it are MoE or not."""
    state = dense_state()
    every, second = (upcycle(state, target(moe_every=n), CopyOptions(), SEED).state for n in (1, 2))
    name = "blocks.1.feed_forward.router.weight_ED"
    assert torch.equal(every[name], second[name])


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.sampled_from([0.0, 0.3, 1.0]), st.integers(1, 5))
def test_noise_meets_its_share_of_the_entries_at_its_size(fraction: float, num_experts: int) -> None:
    state = dense_state(d_model=48, head_dim=8, d_ff=113)
    goal = target(TopKOptions(top_k=1), num_experts=num_experts, d_model=48, head_dim=8, d_ff_expert=113)
    result = upcycle(state, goal, CopyOptions(noise_std=0.25, noise_fraction=fraction), SEED)
    assert result.preserves is (fraction == 0)
    for expert, dense in zip(gate_up_down(result.state, 0, 2), dense_matrices(state, 0, 2), strict=True):
        noise = expert - dense
        hit = noise != 0
        assert abs(hit.double().mean() - fraction) < 4 * (0.25 / hit.numel()) ** 0.5
        if fraction:
            assert abs(noise[hit].std() / 0.25 - 1) < 0.1
            assert abs(noise[hit].mean()) < 5 * 0.25 / hit.sum() ** 0.5


def test_router_rows_have_the_asked_size() -> None:
    state = dense_state(d_model=240, head_dim=8)
    sizes = {"d_model": 240, "head_dim": 8, "num_experts": 29}
    name = "blocks.0.feed_forward.router.weight_ED"
    for std, expected in ((None, 0.5 * 240**-0.5), (0.02, 0.02)):
        rows = upcycle(state, target(**sizes), CopyOptions(router_std=std), SEED).state[name]
        assert abs(rows.std() / expected - 1) < 0.05
    zeros = CopyOptions(router_start=RouterStart.zeros)
    assert not upcycle(state, target(TopKOptions(top_k=29), **sizes), zeros, SEED).state[name].any()


def test_centroids_send_each_cluster_to_an_expert_of_its_own() -> None:
    """Tokens of eight well separated kinds: each expert becomes the best of one of them."""
    generator = torch.Generator().manual_seed(2)
    kinds = 8 * torch.eye(23, dtype=torch.float64)[:8]
    kind_T = torch.arange(8).repeat(7)
    noise = 0.1 * torch.randn(56, 23, generator=generator, dtype=torch.float64)
    inputs_TD = kinds[kind_T] + noise
    calibration = {layer: LayerCalibration(inputs_TD=inputs_TD) for layer in (0, 1)}
    options = CopyOptions(router_start=RouterStart.centroids, router_std=0.5)
    result = upcycle(dense_state(), target(), options, SEED, calibration)
    rows = result.state["blocks.0.feed_forward.router.weight_ED"]
    torch.testing.assert_close(rows.norm(dim=1), torch.full((8,), 0.5 * 23**0.5).double())
    best_T = (inputs_TD @ rows.t()).argmax(1)
    assert len(set(zip(kind_T.tolist(), best_T.tolist(), strict=True))) == len(set(best_T.tolist())) == 8


def test_routers_of_several_maps_start_as_by_themselves() -> None:
    for name in ("noisy_topk", "cosine", "hash"):
        goal = target(RouterConfig(name=name))
        first = upcycle(dense_state(), goal, CopyOptions(), SEED)
        again = upcycle(dense_state(), goal, CopyOptions(), SEED)
        model = loaded(first, goal)
        assert all(torch.equal(first.state[key], again.state[key]) for key in first.state)
        if name != "hash":
            assert torch.isfinite(model.blocks[0].feed_forward(inputs(23))[0]).all()
