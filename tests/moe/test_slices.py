"""Experts of different widths: a layer against loops over whole experts, and what slices keep."""

from __future__ import annotations

import plain_blocks as plain
import pytest
import torch
from torch import Tensor

from moetrain.moe import MoELayer
from moetrain.moe.assignment import Assignment
from moetrain.moe.options import FirstWeights
from moetrain.moe.slices import Slices
from moetrain.ops.experts.table import NAMES

D, WIDTHS = 11, (6, 15, 3, 9)


def layer_of(widths: tuple[int, ...] = WIDTHS, **options: object) -> MoELayer:
    torch.manual_seed(3)
    given = {"router_options": {"top_k": 2}, "num_shared_experts": 1, "backend": "loop", **options}
    return MoELayer(D, max(widths), len(widths), expert_widths=widths, **given).double()


def whole(layer: MoELayer, x_BSD: Tensor) -> Tensor:
    """Each expert's matrices put together from its slices, and the chosen experts summed token by token."""
    up_SDCF, down_SFD = layer.experts.w_gate_up_EDCF, layer.experts.w_down_EFD
    matrices, first = [], 0
    for slices in layer.slices.per_expert:
        span = slice(first, first + slices)
        matrices.append((torch.cat(list(up_SDCF[span]), -1), down_SFD[span].flatten(0, 1)))
        first += slices
    rows = []
    for x_D in x_BSD.flatten(0, 1):
        p_E = (layer.router.weight_ED @ x_D).softmax(0)
        best = p_E.topk(2).indices.tolist()
        total = sum(p_E[e] for e in best)
        y_D = 0
        for e in best:
            up_DCF, down_FD = matrices[e]
            y_D = y_D + p_E[e] / total * ((plain.silu(x_D @ up_DCF[:, 0]) * (x_D @ up_DCF[:, 1])) @ down_FD)
        rows.append(y_D)
    return torch.stack(rows).view_as(x_BSD) + plain.mlp(layer.shared, x_BSD)


@pytest.mark.parametrize("options", [{}, {"backend": "cpu"}, {"max_rows_per_rank": 5}])
def test_it_is_the_layer_of_whole_experts(options: dict[str, object]) -> None:
    layer = layer_of(**options)
    x_BSD = torch.randn(2, 7, D).double().requires_grad_()
    leaves = [x_BSD, *layer.parameters()]
    y_BSD, routing = layer(x_BSD)
    wanted_BSD = whole(layer, x_BSD)
    torch.testing.assert_close(y_BSD, wanted_BSD, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 1, y_BSD.numel()).view_as(y_BSD)
    for ours, theirs in zip(
        torch.autograd.grad((y_BSD * weights).sum(), leaves),
        torch.autograd.grad((wanted_BSD * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    routing.check()
    assert routing.num_experts == 4
    assert routing.width_E.tolist() == list(WIDTHS)
    assert [layer.experts.w_down_EFD.shape[0], layer.experts.w_down_EFD.shape[1]] == [11, 3]


def test_parameters_are_those_of_the_widths() -> None:
    layer = layer_of()
    assert sum(p.numel() for p in layer.experts.parameters()) == 3 * D * sum(WIDTHS)
    assert layer.shared.w_up_FD.shape == (15, D)


def test_equal_widths_are_one_slice_each() -> None:
    assert Slices.of((7, 7, 7)) == Slices(7, (1, 1, 1))


@pytest.mark.parametrize("counts", [[2, 0, 3, 1, 2], [0, 0, 0, 0, 0], [5, 0, 0, 0, 0], [0, 0, 0, 0, 4]])
@pytest.mark.parametrize("host", [True, False])
def test_assignments_go_to_each_slice(counts: list[int], host: bool) -> None:
    """Against a plain loop, with an expert without a network as the last."""
    tokens = [token for count in counts for token in range(count)]
    weights = torch.rand(len(tokens)).double().requires_grad_()
    given = Assignment(
        torch.tensor(tokens, dtype=torch.int64),
        weights,
        torch.tensor(counts),
        forward_scale_N=torch.rand(len(tokens)),
        choice_N=torch.arange(len(tokens)),
        num_ffn_experts=4,
        host_counts=tuple(counts) if host else None,
    )
    wanted, first = [], 0
    for count, slices in zip(counts, [2, 5, 1, 3, 1], strict=True):
        wanted += [range(first, first + count)] * slices
        first += count
    found = Slices.of(WIDTHS).assign(given)
    flat = [n for part in wanted for n in part]
    assert found.counts_E.tolist() == list(map(len, wanted))
    assert found.choice_N.tolist() == flat
    assert found.num_ffn_experts == 11
    assert found.host_counts == (tuple(map(len, wanted)) if host else None)
    assert torch.equal(found.weights_N, weights[flat])
    assert torch.equal(found.forward_scale_N, given.forward_scale_N[flat])


def test_experts_without_a_network_stay_as_they_are() -> None:
    layer = layer_of(router="moepp", router_options={}, num_shared_experts=0)
    y_BSD, routing = layer(torch.randn(2, 7, D).double())
    assert routing.width_E.tolist() == [*WIDTHS, *[0] * (routing.num_experts - 4)]
    assert y_BSD.isfinite().all()


@pytest.mark.filterwarnings("ignore:experts backend")
@pytest.mark.parametrize("backend", [name for name in NAMES if name not in ("auto", "loop", "cpu")])
def test_other_backends_compute_slices_or_take_another_rung(backend: str) -> None:
    options = {"backend": backend} | ({"block": 128} if backend == "megablocks" else {})
    x_BSD = torch.randn(2, 7, D)
    with torch.no_grad():
        y_BSD, _ = layer_of(**options).float()(x_BSD)
    torch.testing.assert_close(y_BSD, layer_of().float()(x_BSD)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"expert_widths": (6, 3)}, "expert_widths has 2 numbers, but there are 4 experts"),
        ({"input_dropout": 0.1}, "experts.input_dropout=0.1 is of experts of one width"),
        ({"expert_widths": (6, 3, 0, 9)}, "expert_widths has 0, but a width is 1 or more"),
        ({"first_weights": FirstWeights.tenth}, "experts.first_weights=tenth is of experts of one width"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        MoELayer(D, 15, 4, **{"expert_widths": WIDTHS, **changes})
