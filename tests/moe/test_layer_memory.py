"""What the layer keeps for backward: no more than its bound, whatever the loads, part by part.

Shapes: T tokens, D model, F hidden, E experts, k experts a token.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from moetrain.moe import MoELayer
from moetrain.parallel.precision import round_for_inference

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import kept
import memory

BF16 = torch.bfloat16
# T, D, F, E, k, block; torch's grouped product takes widths of 8 elements of bf16
SIZES = [(37, 24, 40, 5, 2, 7), (1, 8, 56, 11, 3, 32), (53, 40, 88, 7, 1, 16), (13, 56, 24, 5, 3, 1)]


def layer_of(sizes: kept.Layer, backend: str) -> MoELayer:
    torch.manual_seed(sizes.tokens)
    layer = MoELayer(
        sizes.d_model, sizes.d_ff, sizes.experts, router_options={"top_k": sizes.top_k}, backend=backend,
        block=sizes.block,
    )  # fmt: skip
    if sizes.dtype is BF16:
        round_for_inference(layer, BF16)
    return layer


def kept_by(layer: nn.Module, sizes: kept.Layer) -> dict[str, int]:
    x_BSD = torch.randn(1, sizes.tokens, sizes.d_model).to(sizes.dtype).requires_grad_()
    return sizes.parts(kept.kept_storages(lambda: layer(x_BSD)[0], layer))


@pytest.mark.parametrize("skew", [False, True], ids=["even", "skew"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_a_layer_keeps_no_more_than_its_bound(
    shape: tuple[int, ...], backend: str, dtype: torch.dtype, skew: bool
) -> None:
    sizes = kept.Layer(*shape, dtype)
    layer = layer_of(sizes, backend)
    if skew:  # all tokens on the same experts
        layer.router.bias_E += torch.linspace(9, 0, sizes.experts)
    found, bound = kept_by(layer, sizes), sizes.bound()
    assert set(found) == set(kept.PARTS)
    assert all(0 < found[part] <= bound[part] for part in kept.PARTS), (found, bound)


def test_the_bound_is_of_the_formula() -> None:
    """In bf16: 4 R F + 2 T D, R = N + E (block - 1)."""
    bound = kept.Layer(37, 24, 40, 5, 2, 7, BF16).bound()
    rows = 74 + 5 * 6
    assert bound[kept.Z] + bound[kept.INPUT] == 4 * rows * 40 + 2 * 37 * 24
    assert sum(bound.values()) < 1.25 * (4 * rows * 40 + 2 * 37 * 24) + 8 * 4 * 74


def test_what_is_kept_beyond_the_bound_is_named() -> None:
    """The loop of autograd keeps gathered rows and hidden rows, which no part of the bound has."""
    sizes = kept.Layer(*SIZES[0], BF16)
    found = kept_by(layer_of(sizes, "loop"), sizes)
    assert {"rows of width D", "hidden rows"} <= set(found)
    figures = {"bound": sizes.bound(), "layers": {"moetrain cpu": {"bytes": sum(found.values())}}}
    assert len(memory.faults(figures)) == 1
    figures["layers"] = {"another": {"bytes": sum(sizes.bound().values()) - 1}}
    assert len(memory.faults(figures)) == 1


def test_a_storage_counts_once_and_parameters_do_not() -> None:
    linear = nn.Linear(13, 7, bias=False)
    x = torch.randn(5, 13, requires_grad=True)
    (one,) = kept.kept_storages(lambda: linear(x) + linear(x[:3]).sum(), linear)
    assert one.bytes == 4 * 5 * 13
