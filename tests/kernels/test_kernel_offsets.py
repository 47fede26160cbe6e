"""Offsets beyond 2 ** 31 elements: each operand in turn is a view whose rows, or experts, lie that far apart.

Shapes: X source rows, D model, E experts, F hidden, P = 2F, R block-aligned rows.
"""

from __future__ import annotations

import huge
import pytest
import torch
from torch import Tensor

from moetrain.kernels import metadata
from moetrain.kernels.combine import combine
from moetrain.kernels.grouped.hidden_gradient import hidden_gradient
from moetrain.kernels.grouped.product import product
from moetrain.kernels.grouped.up import up
from moetrain.kernels.grouped.weight_gradient import weight_gradient

X, D, E, F = 5, 19, 3, 7
BLOCK = 16
LAST = {X: X - 1, E: E - 1, 2 * BLOCK: BLOCK + 3}  # what is read or written last, padding aside

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the views are of the host's memory")


@pytest.fixture
def meta() -> metadata.Metadata:
    """Expert 2 has rows, the last source row among them."""
    token_ids_N = torch.tensor([1, 0, 2, 3, 4])
    counts_E = torch.tensor([1, 0, 4])
    return metadata.lay_out(token_ids_N, torch.ones(5), counts_E, BLOCK, X)[0]


def operands() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(23)
    rows = 2 * BLOCK  # those of the blocks that are used
    shapes = {
        "source": (X, D), "w_up": (E, D, 2 * F), "z": (rows, 2 * F), "h": (rows, F), "weights": (4 * BLOCK,),
        "w_down": (E, F, D), "out": (rows, D), "dz": (rows, 2 * F), "dy": (X, D),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=g).half() for name, shape in shapes.items()}


def up_projection(t: dict[str, Tensor], meta: metadata.Metadata) -> list[Tensor]:
    up(t["source"], meta, t["weights"], t["w_up"], "swiglu", t["z"], t["h"])
    return [t["z"], t["h"]]


def down_projection(t: dict[str, Tensor], meta: metadata.Metadata) -> list[Tensor]:
    product(t["h"], meta, t["w_down"], t["out"])
    return [t["out"]]


def input_gradient(t: dict[str, Tensor], meta: metadata.Metadata) -> list[Tensor]:
    product(t["dz"], meta, t["w_up"].transpose(1, 2), t["out"])
    return [t["out"]]


def gradient_of_hidden(t: dict[str, Tensor], meta: metadata.Metadata) -> list[Tensor]:
    dweights_R = hidden_gradient(
        t["dy"], meta, t["weights"], t["w_down"], t["z"], "swiglu", t["dz"], t["h"], gathered=True
    )
    return [dweights_R, t["dz"], t["h"]]


def gradient_of_weights(t: dict[str, Tensor], meta: metadata.Metadata) -> list[Tensor]:
    out_EDP = torch.empty(E, D, 2 * F, dtype=torch.float16)
    weight_gradient(t["source"], t["dz"], meta, out_EDP, (True, False))
    return [out_EDP]


def sum_of_rows(t: dict[str, Tensor], meta: metadata.Metadata) -> list[Tensor]:
    return [combine(t["out"], meta.by_source_N, meta.ends_X)]


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (kernel, name)
        for kernel, names in (
            (up_projection, ("source", "w_up", "z", "h")),
            (down_projection, ("h", "w_down", "out")),
            (input_gradient, ("dz", "w_up", "out")),
            (gradient_of_hidden, ("dy", "w_down", "z", "dz", "h")),
            (gradient_of_weights, ("source", "dz")),
            (sum_of_rows, ("out",)),
        )
        for name in names
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_offsets_beyond_32_bits(kernel, name: str, meta: metadata.Metadata) -> None:
    near, far = operands(), operands()
    far[name] = huge.spread(far[name], LAST[len(far[name])])
    for got, want in zip(kernel(far, meta), kernel(near, meta), strict=True):
        assert torch.equal(got, want)
