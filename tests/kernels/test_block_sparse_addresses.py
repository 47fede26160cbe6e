"""Operands that span more than 2^31 elements: what an index meets a stride in is 64 bits wide.

Memory is reserved, but only what the operands' elements lie in is touched.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moetrain.kernels.block_sparse.activation import weighted_activation, weighted_activation_backward
from moetrain.kernels.block_sparse.dsd import dsd
from moetrain.kernels.block_sparse.masked import masked_gradient, masked_product
from moetrain.kernels.block_sparse.masks import matrix_blocks
from moetrain.kernels.block_sparse.sdd import sdd
from moetrain.kernels.block_sparse.topology import Topology, expert_topology, rows_by_expert

LIMIT = 1 << 31
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # the operands below are made once


@pytest.fixture(scope="module")
def reserve() -> Tensor:
    return torch.empty(LIMIT * 3 // 2 + 64, dtype=torch.float16, device=DEVICE)


def far(near: Tensor, reserve: Tensor) -> Tensor:
    """The same values; the last matrix, block of rows, or row of the only block is behind 2^31 elements.

    So each product of an index and a stride passes 2^31 by itself, of blocks and of rows in a block.
    """
    blocks = near.dim() == 2 and near.shape[0] > 16
    apart = LIMIT // (near.shape[0] - (16 if blocks else 1)) + 5
    view = reserve.as_strided(near.shape, (apart, *near.stride()[1:]))
    return view.copy_(near)


def halves(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half().to(DEVICE)


EXPERTS = torch.tensor([2, 0, -1, 2], dtype=torch.int32, device=DEVICE)
TOPOLOGY = expert_topology(EXPERTS, 3, 19, 16, 16)
ROWS, WIDE, VALUES = halves(64, 13, seed=1), halves(3, 13, 19, seed=2), halves(64, 19, seed=3)
MASK = torch.tensor([[[True, False]], [[True, True]], [[False, True]]], device=DEVICE)
BLOCKS = matrix_blocks(MASK, 13, 19, 16)
WEIGHTS = torch.linspace(-1, 2, 64, device=DEVICE)


@pytest.mark.parametrize("which", ["rows", "matrices", "values"])
def test_sdd_far_apart(which: str, reserve: Tensor) -> None:
    want = sdd(ROWS, WIDE, TOPOLOGY, torch.zeros_like(VALUES))
    rows, wide, out = ROWS, WIDE, torch.zeros_like(VALUES)
    if which == "rows":
        rows = far(rows, reserve)
    elif which == "matrices":
        wide = far(wide, reserve)
    else:
        out = far(out, reserve)
    assert torch.equal(sdd(rows, wide, TOPOLOGY, out), want)


def check_dsd(
    which: str, topology: Topology, values: Tensor, dense: Tensor, transposed: bool, reserve: Tensor
) -> None:
    want = dsd(values, topology, dense, transposed)
    out = torch.zeros_like(want)
    if which == "values":
        values = far(values, reserve)
    elif which == "dense":
        dense = far(dense, reserve)
    else:
        out = far(out, reserve)
    assert torch.equal(dsd(values, topology, dense, transposed, out), want)


@pytest.mark.parametrize("transposed", [False, True], ids=["S", "S^T"])
@pytest.mark.parametrize("which", ["values", "dense", "out"])
def test_dsd_far_apart(which: str, transposed: bool, reserve: Tensor) -> None:
    check_dsd(which, TOPOLOGY, VALUES, ROWS if transposed else WIDE.mT.contiguous(), transposed, reserve)


@pytest.mark.parametrize("transposed", [False, True], ids=["S", "S^T"])
@pytest.mark.parametrize("which", ["values", "dense", "out"])
def test_dsd_far_apart_in_one_block(which: str, transposed: bool, reserve: Tensor) -> None:
    topology = expert_topology(EXPERTS[:1], 3, 19, 16, 16)
    dense = ROWS[:16] if transposed else WIDE.mT.contiguous()
    check_dsd(which, topology, VALUES[:16].contiguous(), dense, transposed, reserve)


@pytest.mark.parametrize("which", ["rows", "values"])
def test_sdd_far_apart_in_one_block(which: str, reserve: Tensor) -> None:
    topology = expert_topology(EXPERTS[:1], 3, 19, 16, 16)
    want = sdd(ROWS[:16], WIDE, topology)
    rows, out = ROWS[:16], torch.zeros_like(want)
    rows, out = (far(rows, reserve), out) if which == "rows" else (rows, far(out, reserve))
    assert torch.equal(sdd(rows, WIDE, topology, out), want)


@pytest.mark.parametrize("which", ["rows", "matrices"])
def test_masked_products_far_apart(which: str, reserve: Tensor) -> None:
    rows, wide = (far(ROWS, reserve), WIDE) if which == "rows" else (ROWS, far(WIDE, reserve))
    assert torch.equal(
        masked_product(rows, wide, BLOCKS, EXPERTS), masked_product(ROWS, WIDE, BLOCKS, EXPERTS)
    )
    by_expert = rows_by_expert(EXPERTS, 3)
    if which == "rows":
        want = masked_gradient(ROWS, VALUES, BLOCKS, by_expert, torch.float16)
        assert torch.equal(masked_gradient(rows, VALUES, BLOCKS, by_expert, torch.float16), want)


def test_activations_far_apart(reserve: Tensor) -> None:
    here = (EXPERTS >= 0).repeat_interleave(16)
    dh, z = halves(64, 19, seed=5), halves(64, 38, seed=7)
    want = weighted_activation(z, WEIGHTS, EXPERTS, "swiglu")
    assert torch.equal(weighted_activation(far(z, reserve), WEIGHTS, EXPERTS, "swiglu")[here], want[here])
    both = weighted_activation_backward(dh, z, WEIGHTS, EXPERTS, "swiglu")
    for one, other in zip(
        weighted_activation_backward(dh, far(z, reserve), WEIGHTS, EXPERTS, "swiglu"), both, strict=True
    ):
        assert torch.equal(one[here], other[here])
    for one, other in zip(
        weighted_activation_backward(far(dh, reserve), z, WEIGHTS, EXPERTS, "swiglu"), both, strict=True
    ):
        assert torch.equal(one[here], other[here])
