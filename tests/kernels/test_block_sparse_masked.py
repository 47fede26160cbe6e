"""Expert layers with block-sparse matrices against the same with zeros there, and masks by magnitude.

Shapes: X source rows, D model, R rows in blocks of one expert, E experts, F hidden, P = 2F or F.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import block_sparse_cases as cases
import pytest
import torch
from block_sparse_cases import BOUNDS, close
from torch import Tensor

from moetrain.kernels.activations import GATED, PLAIN
from moetrain.kernels.block_sparse import masked_experts
from moetrain.kernels.block_sparse.masked import masked_product
from moetrain.kernels.block_sparse.masks import magnitude_mask, matrix_blocks
from moetrain.kernels.twins import block_sparse as twin

# counts of experts' rows, D, F, block of rows, block of matrices, share of blocks, activation
CASES = [
    ([16, 16], 16, 16, 16, 16, 1.0, "swiglu"), ([3, 0, 17], 37, 29, 16, 16, 0.5, "swiglu"),
    ([0, 23], 53, 17, 32, 32, 0.6, "geglu"), ([7, 1], 19, 31, 16, 16, 0.0, "relu"),
    ([1], 5, 3, 16, 32, 1.0, "relu2"),
    ([0, 0], 17, 13, 16, 16, 0.5, "gelu"), ([5, 0, 0, 39], 31, 41, 16, 32, 0.4, "reglu"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned(device: torch.device) -> Iterator[None]:
    with cases.poisoned(device):
        yield


def masks_of(shape: tuple[int, ...], block: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """A random mask of blocks, and that of elements."""
    experts, rows, columns = shape
    down, along = -(-rows // block), -(-columns // block)
    mask = cases.random_mask(experts * down, along, share, seed).view(experts, down, along)
    return mask, torch.stack([twin.elements(each, rows, columns, block, block) for each in mask])


def check(
    counts: list[int], model: int, hidden: int, block: int, width: int, share: float, activation: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Output and every gradient against the twin's; absent blocks are NaN for the kernels, zero for it."""
    torch.manual_seed(model)
    ids_R, weights_R, experts_B = cases.rows_of(counts, 11, block, seed=hidden)
    experts, columns = len(counts), hidden * (2 if activation in GATED else 1)
    source = torch.randn(11, model).to(dtype)
    w_up = (torch.randn(experts, model, columns) / model**0.5).to(dtype)
    w_down = (torch.randn(experts, hidden, model) / hidden**0.5).to(dtype)
    up_mask, up_here = masks_of((experts, model, columns), width, share, seed=1)
    down_mask, down_here = masks_of((experts, hidden, model), width, share, seed=2)
    up, down = matrix_blocks(up_mask, model, columns, width), matrix_blocks(down_mask, hidden, model, width)
    dout = torch.randn(ids_R.shape[0], model).to(dtype)
    holes = w_up.masked_fill(~up_here, torch.nan), w_down.masked_fill(~down_here, torch.nan)
    arguments = source, ids_R, experts_B, weights_R, *holes
    out, z = masked_experts.forward(*arguments, up, down, activation)
    got = masked_experts.backward(dout, *arguments, z, up, down, activation)

    leaves = [each.double().requires_grad_() for each in (source, weights_R, w_up, w_down)]
    source_64, weights_64, up_64, down_64 = leaves
    want = twin.experts(
        source_64, ids_R, experts_B.repeat_interleave(block), weights_64,
        torch.where(up_here, up_64, 0), torch.where(down_here, down_64, 0), activation,
    )  # fmt: skip
    grads = torch.autograd.grad(want, leaves, dout.double(), materialize_grads=True)
    bound = BOUNDS[dtype] * (2 if dtype is torch.float32 else 4)
    close(out, want.detach(), bound)
    used = ids_R >= 0
    dsource = torch.zeros(source.shape, dtype=torch.float64)
    dsource.index_add_(0, ids_R[used], got[0][used].double())
    for one, other in zip((dsource, *got[1:]), grads, strict=True):
        close(one, other, bound)
    assert not got[2][~up_here].any()
    assert not got[3][~down_here].any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_equals_zeros_in_absent_blocks(case: tuple[list[int], int, int, int, int, float, str]) -> None:
    check(*case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_masked_layer_of_half_precision(dtype: torch.dtype) -> None:
    check([5, 0, 18], 37, 19, 16, 16, 0.5, "swiglu", dtype)


@pytest.mark.parametrize("per_layer", [False, True], ids=["expert", "layer"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 1.0])
def test_blocks_of_the_largest_norms_are_kept(share: float, per_layer: bool) -> None:
    torch.manual_seed(3)
    weights = torch.randn(3, 53, 71) * torch.tensor([1.0, 2.0, 0.5])[:, None, None]
    mask = magnitude_mask(weights, share, 16, per_layer)
    assert torch.equal(mask, twin.magnitude_mask(weights, share, 16, per_layer))
    kept = mask.flatten(1).sum(1).tolist()
    assert kept == [max(1, round(share * 20))] * 3 or (per_layer and sum(kept) == max(1, round(share * 60)))


def test_of_equal_blocks_the_earlier_are_kept() -> None:
    mask = magnitude_mask(torch.ones(2, 32, 48), 0.5, 16)
    assert mask.tolist() == [[[True, True, True], [False, False, False]]] * 2
    whole = magnitude_mask(torch.ones(2, 32, 48), 0.5, 16, per_layer=True)
    assert whole.tolist() == [[[True] * 3] * 2, [[False] * 3] * 2]


def test_a_mask_that_does_not_fit_is_refused() -> None:
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"37 x 65 in blocks of 16 need a mask of \[experts, 3, 5\], not \(2, 3, 4"
    ):
        matrix_blocks(mask, 37, 65, 16)
    with pytest.raises(ValueError, match=r"needs a bool mask of 6 x 4, not torch.int64"):
        matrix_blocks(mask.long(), 37, 64, 16)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"above 0 and at most 1, not {share}"):
            magnitude_mask(torch.ones(1, 16, 16), share, 16)
    blocks = matrix_blocks(mask, 37, 64, 16)
    with pytest.raises(ValueError, match="40 rows are no 2 blocks of 16, 32, 64, 128 rows each"):
        masked_product(torch.ones(40, 37), torch.ones(2, 37, 64), blocks, torch.zeros(2, dtype=torch.int32))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_masked_layer_of_random_sizes(seed: int) -> None:
    generator = random.Random(seed)
    counts = cases.counts_of(generator)
    model, hidden = cases.sizes(generator, 2, 256 if len(counts) < 10 else 32)
    blocks = generator.choice([16, 32, 64]), generator.choice([16, 32])
    dtype = generator.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    activation = (GATED + PLAIN)[seed % 8]
    check(counts, model, hidden, *blocks, generator.random(), activation, dtype)
