"""SDD, DSD and DDS and their gradients against dense products under a mask, in fp64.

Shapes: M rows, K depth, G groups of W columns, N and Q columns and rows of dense matrices.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import block_sparse_cases as cases
import pytest
import torch
from block_sparse_cases import BOUNDS, close, flat, masked, of_experts, rest, to_dense
from torch import Tensor

from moetrain.kernels.block_sparse.autograd import dds_product, dsd_product, sdd_product
from moetrain.kernels.block_sparse.dds import dds
from moetrain.kernels.block_sparse.dsd import dsd
from moetrain.kernels.block_sparse.sdd import sdd
from moetrain.kernels.block_sparse.topology import Topology
from moetrain.kernels.twins import block_sparse as twin

# rows, columns, block_m, block_n, share of blocks, depth
MASKS = [
    (16, 16, 16, 16, 1.0, 16), (1, 1, 16, 16, 1.0, 1), (37, 53, 16, 16, 0.5, 29), (53, 37, 32, 16, 0.4, 17),
    (64, 71, 16, 64, 0.6, 11), (97, 31, 32, 32, 0.0, 13), (29, 89, 16, 32, 0.3, 0),
    (101, 103, 64, 32, 0.5, 3),
]  # fmt: skip
# expert of each block of rows, experts, width of an expert, block_m, block_n, depth
EXPERTS = [
    ([0, 0, 2, -1], 3, 37, 16, 16, 23), ([1], 2, 13, 32, 16, 7), ([-1, -1], 2, 17, 16, 32, 5),
    ([3, 3, 3], 5, 32, 16, 32, 19), ([0, -1, 2, 0], 3, 31, 16, 16, 11), ([], 3, 17, 16, 16, 5),
]  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned(device: torch.device) -> Iterator[None]:
    with cases.poisoned(device):
        yield


def product(name: str, topology: Topology, mask: Tensor, depth: int, dtype: torch.dtype) -> None:
    """Compare a product and its gradients with the twin's; ``name`` is one of ``NAMES``."""
    torch.manual_seed(depth)
    rows, (groups, width) = topology.rows.width, (topology.columns.groups, topology.columns.width)
    tall, wide = torch.randn(rows, depth).to(dtype), torch.randn(groups, depth, width).to(dtype)
    values = torch.randn(topology.values_shape).to(dtype)
    transposed = name.endswith("T")
    if name == "sdd":
        leaves, run = [tall, wide], lambda a, b: to_dense(sdd_product(a, b, topology), topology)
        assert not rest(sdd_product(tall, wide, topology), topology).any()
        want_run = lambda a, b: twin.sdd(a, flat(b), mask)  # noqa: E731
    elif name.startswith("dsd"):
        leaves = [values, tall if transposed else wide.mT]
        run = lambda v, d: dsd_product(v, topology, d, transposed)  # noqa: E731
        want_run = lambda v, d: _dsd(to_dense(v, topology), d, mask, groups)  # noqa: E731
    else:
        leaves = [wide if transposed else tall.mT, values]
        run = lambda d, v: dds_product(d, v, topology, transposed)  # noqa: E731
        want_run = lambda d, v: _dds(d, to_dense(v, topology), mask, groups)  # noqa: E731
    got, want = _values(run, leaves), _values(want_run, [leaf.double() for leaf in leaves])
    for one, other in zip(got, want, strict=True):
        assert one.dtype is dtype
        close(one, other, BOUNDS[dtype])


def _dsd(sparse: Tensor, dense: Tensor, mask: Tensor, groups: int) -> Tensor:
    if dense.dim() == 3:
        return twin.dsd(sparse, dense.flatten(0, 1), mask)
    return twin.dsd(sparse.mT, dense, mask.mT).unflatten(0, (groups, -1))


def _dds(dense: Tensor, sparse: Tensor, mask: Tensor, groups: int) -> Tensor:
    if dense.dim() == 3:
        return twin.dds(flat(dense), sparse.mT, mask.mT)
    return twin.dds(dense, sparse, mask).unflatten(1, (groups, -1)).transpose(0, 1)


def _values(run: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = run(*leaves)
    cotangent = torch.linspace(-2, 3, out.numel(), dtype=torch.float32).sin().view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(leaves[0].dtype))]


NAMES = ["sdd", "dsd", "dsd^T", "dds", "dds^T"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", MASKS, ids=str)
def test_products_of_a_masked_matrix(name: str, case: tuple[int, int, int, int, float, int]) -> None:
    *sizes, depth = case
    product(name, *masked(*sizes, seed=3), depth, torch.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", EXPERTS, ids=lambda case: str(case[0]))
def test_products_of_experts(name: str, case: tuple[list[int], int, int, int, int, int]) -> None:
    *sizes, depth = case
    product(name, *of_experts(*sizes), depth, torch.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_products_of_half_precision(name: str, dtype: torch.dtype) -> None:
    product(name, *masked(37, 53, 16, 32, 0.6, seed=1), 19, dtype)
    product(name, *of_experts([0, 2, 2, -1], 3, 29, 16, 16), 13, dtype)


def fenced(x: Tensor) -> Tensor:
    """The same values; what lies beside them in memory is no number."""
    room = x.new_full([n + 17 for n in x.shape], torch.nan)
    view = room[tuple(slice(n) for n in x.shape)]
    return view.copy_(x)


@pytest.mark.parametrize("transposed", [False, True], ids=["S", "S^T"])
def test_what_lies_beside_an_operand_is_not_read(transposed: bool) -> None:
    topology, _ = of_experts([0, 0, 2, -1], 3, 37, 16, 16)
    a_MK, b_GKW, values_VW = torch.randn(64, 23), torch.randn(3, 23, 37), torch.randn(64, 37)
    dense = a_MK if transposed else b_GKW.mT
    want = dsd(values_VW, topology, dense, transposed)
    assert torch.equal(dsd(fenced(values_VW), topology, fenced(dense), transposed), want)
    want = dds(dense.mT, values_VW, topology, not transposed)
    assert torch.equal(dds(fenced(dense.mT), fenced(values_VW), topology, not transposed), want)
    here = (topology.rows_N.view(4, -1)[:, 0] >= 0).repeat_interleave(16)
    assert torch.equal(sdd(fenced(a_MK), fenced(b_GKW), topology)[here], sdd(a_MK, b_GKW, topology)[here])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(120))
def test_products_of_random_matrices(seed: int) -> None:
    generator = random.Random(seed)
    rows, columns, depth = cases.sizes(generator, 3)
    block_m, block_n = generator.choice([16, 32, 64]), generator.choice([16, 32, 64])
    dtype = generator.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    if seed % 2:
        topology = masked(rows, columns, block_m, block_n, generator.random(), seed)
    else:
        experts = generator.choice([1, 3, 7])
        blocks = [generator.randrange(-1, experts) for _ in range(-(-rows // block_m))]
        topology = of_experts(blocks, experts, -(-columns // experts), block_m, block_n)
    product(NAMES[seed // 2 % len(NAMES)], *topology, depth, dtype)
