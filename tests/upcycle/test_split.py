"""One network dealt out to experts: every unit once, all parts together are the network.

Shapes: E experts, F units of an expert, N of the dense network, T tokens.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from upcycle_cases import SEED, dense_matrices, dense_state, gate_up_down, inputs, target, worst

from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.sigmoid import SigmoidOptions
from moetrain.moe.routers.topk import TopKOptions
from moetrain.ops.activations import ACTIVATIONS, activate, is_gated
from moetrain.upcycle import LayerCalibration, RouterStart, SplitBy, SplitOptions, upcycle
from moetrain.upcycle.cluster import balanced_kmeans

SIZES = {"d_ff": 35, "d_ff_expert": 5, "num_experts": 7}
SHARED = {"d_ff": 35, "d_ff_expert": 5, "num_experts": 5, "num_shared_experts": 2}
GATED = {**SHARED, "num_shared_experts": 1, "d_ff_shared": 10, "shared_gate": True}
EVEN = RouterStart.zeros


def calibration(activation: str = "swiglu") -> dict[int, LayerCalibration]:
    """What the dense layers of ``dense_state(activation, d_ff=35)`` do; their saliencies are made up."""
    state, x_TD = dense_state(activation, d_ff=35), inputs(23, seed=9).flatten(0, 1)
    found = {}
    for layer in (0, 1):
        *ups, _ = dense_matrices(state, layer, 2 if is_gated(activation) else 1)
        *gate, up = (x_TD @ matrix_FD.t() for matrix_FD in ups)
        hidden_TF = activate(gate[0] if gate else None, up, activation)
        found[layer] = LayerCalibration(x_TD, hidden_TF, (hidden_TF * hidden_TF.roll(1, 0)).abs())
    return found


@pytest.mark.parametrize("by", list(SplitBy))
@pytest.mark.parametrize("sizes", [SIZES, SHARED, GATED])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_experts_at_even_weights_are_the_network(
    activation: str, sizes: dict[str, int], by: SplitBy
) -> None:
    goal = target(TopKOptions(top_k=sizes["num_experts"]), activation, **sizes)
    options = SplitOptions(by=by, router_start=EVEN)
    state = dense_state(activation, d_ff=35)
    error, result = worst(goal, state, options, calibration=calibration(activation))
    assert error < 1e-12
    assert result.preserves


@pytest.mark.parametrize(
    ("router", "scale"),
    [
        (TopKOptions(top_k=7), 7.0),
        (TopKOptions(top_k=2), 7.0),
        (TopKOptions(top_k=7, route_scale=0.5), 14.0),
        (TopKOptions(top_k=2, renormalize=False), 24.5),
        (SigmoidOptions(top_k=7, renormalize=False), 2.0),
    ],
)
def test_the_factor(router: TopKOptions, scale: float) -> None:
    """E / (k w); where all experts are chosen, it makes them the network."""
    start = EVEN if router.top_k == 7 else RouterStart.normal
    state = dense_state(d_ff=35)
    error, result = worst(target(router, **SIZES), state, SplitOptions(router_start=start))
    assert result.preserves is (router.top_k == 7)
    assert (error < 1e-12) is (router.top_k == 7)
    found = gate_up_down(result.state, 0, 2)[2].sum()
    torch.testing.assert_close(found, scale * dense_matrices(state, 0, 2)[2].sum())
    assert f"{scale:.6g}" in result.notes[0]


@pytest.mark.parametrize(
    ("router", "options", "word"),
    [
        (TopKOptions(top_k=7), SplitOptions(), "router_start=zeros"),
        (TopKOptions(top_k=7), SplitOptions(router_start=EVEN, scale=3.0), "scale=3"),
        (TopKOptions(top_k=6), SplitOptions(), "6 of 7"),
        (TopKOptions(top_k=7, capacity_factor=0.3, min_capacity=0), SplitOptions(router_start=EVEN), "capac"),
        (RouterConfig(name="expert_choice"), SplitOptions(scale=7.0), "None of 7"),
    ],
)
def test_nothing_is_promised_elsewhere(router: RouterConfig, options: SplitOptions, word: str) -> None:
    error, result = worst(target(router, **SIZES), dense_state(d_ff=35), options)
    assert error > 1e-6
    assert not result.preserves
    assert word in result.reason


def units_of(result: dict[str, Tensor], state: dict[str, Tensor], layer: int = 0) -> Tensor:
    """int64 [E, F]: the dense unit of each expert's, told by its up row."""
    expert_EFD, dense_ND = gate_up_down(result, layer, 2)[1], dense_matrices(state, layer, 2)[1]
    same_EFN = (expert_EFD[:, :, None] == dense_ND).all(-1)
    assert (same_EFN.sum(-1) == 1).all()
    return same_EFN.long().argmax(-1)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 3), st.sampled_from(list(SplitBy)))
def test_every_unit_is_in_one_place(experts: int, width: int, shared: int, by: SplitBy) -> None:
    d_ff = (experts + shared) * width
    state = dense_state(d_ff=d_ff)
    sizes = {"d_ff": d_ff, "d_ff_expert": width, "num_experts": experts, "num_shared_experts": shared}
    hidden = torch.randn(11, d_ff, generator=torch.Generator().manual_seed(d_ff))
    seen = LayerCalibration(inputs(23)[0], hidden, hidden.square())
    given_ = dict.fromkeys((0, 1), seen)
    result = upcycle(state, target(TopKOptions(top_k=1), **sizes), SplitOptions(by=by), SEED, given_).state
    units = units_of(result, state).flatten()
    if shared:
        up_QD = result["blocks.0.feed_forward.shared.w_up_FD"]
        same = (up_QD[:, None] == dense_matrices(state, 0, 2)[1]).all(-1)
        if by is not SplitBy.gradients:
            strongest = hidden.abs().mean(0).topk(shared * width).indices
            assert torch.equal(same.long().argmax(-1), strongest.sort().values)
        units = torch.cat([units, same.long().argmax(-1)])
    assert torch.equal(units.sort().values, torch.arange(d_ff))


def test_units_that_fire_together_stay_together() -> None:
    """Seven kinds of tokens, five units for each: clusters find them, whatever the units' strength."""
    generator = torch.Generator().manual_seed(4)
    kind_N = torch.randperm(35, generator=generator) % 7
    kind_T = torch.arange(7).repeat(11)
    strength_N = torch.rand(35, generator=generator) * 9 + 1
    sign_TN = torch.randn(77, 35, generator=generator).sign()
    hidden_TN = (kind_T[:, None] == kind_N) * strength_N * sign_TN
    hidden_TN = hidden_TN + 0.05 * torch.randn(77, 35, generator=generator)
    state, goal = dense_state(d_ff=35), target(**SIZES)
    given_ = {layer: LayerCalibration(hidden_TF=hidden_TN) for layer in (0, 1)}
    found = {}
    for by in (SplitBy.random, SplitBy.clusters):
        result = upcycle(state, goal, SplitOptions(by=by), SEED, given_).state
        found[by] = [len(set(kind_N[units_F].tolist())) for units_F in units_of(result, state)]
    assert found[SplitBy.clusters] == [1] * 7
    assert max(found[SplitBy.random]) > 1


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 29), st.integers(1, 5), st.integers(0, 99))
def test_clusters_are_balanced_and_no_swap_gains(points: int, clusters: int, seed: int) -> None:
    clusters = min(clusters, points)
    generator = torch.Generator().manual_seed(seed)
    points_NW = torch.randn(points, 3, generator=generator, dtype=torch.float64)
    cluster_N, centroids_CW = balanced_kmeans(points_NW, clusters, generator)
    sizes = np.bincount(cluster_N.numpy(), minlength=clusters)
    assert sizes.max() - sizes.min() <= 1
    cost_NC = torch.cdist(points_NW, centroids_CW).square()
    here_N = cost_NC.gather(1, cluster_N[:, None]).squeeze(1)
    there_NN = cost_NC[:, cluster_N]  # what point i would cost in j's place
    assert (there_NN + there_NN.t() - here_N - here_N[:, None] > -1e-9).all()
