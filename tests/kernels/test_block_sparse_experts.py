"""The dropless layer of block-sparse products against one row at a time, in fp64.

Shapes: X source rows, D model, R rows in blocks of one expert, E experts, F hidden, P = 2F or F.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import block_sparse_cases as cases
import pytest
import torch
from block_sparse_cases import BOUNDS, close, rows_of

from moetrain.kernels.activations import GATED, PLAIN
from moetrain.kernels.block_sparse import experts
from moetrain.kernels.twins import block_sparse as twin

# counts of experts' rows, D, F, block, activation
CASES = [
    ([16, 32, 16], 16, 16, 16, "swiglu"), ([3, 0, 17, 5], 29, 37, 16, "swiglu"),
    ([0, 0, 31], 13, 19, 32, "geglu"),
    ([1], 7, 5, 16, "reglu"), ([0, 0], 11, 23, 16, "gelu"), ([0, 53, 0], 17, 41, 32, "relu"),
    ([5, 2, 0, 41, 1], 23, 17, 16, "relu2"), ([13, 0, 7], 31, 29, 64, "silu"),
    ([2, 19, 0, 3], 19, 31, 16, "swiglu_clamped"), ([7, 0, 18], 23, 13, 16, "drelu"),
    ([4, 0, 23, 1], 13, 29, 16, "geglu_tanh"),
    ([int(e % 31 == 3) for e in range(160)], 5, 3, 16, "swiglu"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned(device: torch.device) -> Iterator[None]:
    with cases.poisoned(device):
        yield


def check(
    counts: list[int], model: int, hidden: int, block: int, activation: str, dtype: torch.dtype
) -> None:
    """Output and every gradient against the twin's."""
    torch.manual_seed(model)
    ids_R, weights_R, experts_B = rows_of(counts, 11, block, seed=hidden)
    width = hidden * (2 if activation in GATED else 1)
    source = torch.randn(11, model).to(dtype)
    w_up = (torch.randn(len(counts), model, width) / model**0.5).to(dtype)
    w_down = (torch.randn(len(counts), hidden, model) / hidden**0.5).to(dtype)
    dout = torch.randn(ids_R.shape[0], model).to(dtype)
    topology = experts.topologies(experts_B, len(counts), hidden, block, activation)
    out, z = experts.forward(source, ids_R, weights_R, w_up, w_down, topology, activation)
    assert z.shape == (ids_R.shape[0], width)
    got = experts.backward(dout, source, ids_R, weights_R, w_up, w_down, z, topology, activation)

    leaves = [each.double().requires_grad_() for each in (source, weights_R, w_up, w_down)]
    experts_R = experts_B.repeat_interleave(block)
    want = twin.experts(leaves[0], ids_R, experts_R, *leaves[1:], activation)
    grads = torch.autograd.grad(want, leaves, dout.double(), materialize_grads=True)
    bound = BOUNDS[dtype] * (2 if dtype is torch.float32 else 4)  # h and dh are rounded on the way
    close(out, want.detach(), bound)
    used = ids_R >= 0
    dsource = torch.zeros(source.shape, dtype=torch.float64)
    dsource.index_add_(0, ids_R[used], got[0][used].double())
    for one, other in zip((dsource, *got[1:]), grads, strict=True):
        close(one, other, bound)
    assert not got[0][~used].any()
    assert [one.dtype for one in (out, *got)] == [dtype, dtype, torch.float32, dtype, dtype]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[-1]}"[-30:])
def test_layer_equals_one_row_at_a_time(case: tuple[list[int], int, int, int, str]) -> None:
    check(*case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_layer_of_half_precision(dtype: torch.dtype) -> None:
    check([5, 0, 18], 13, 19, 16, "swiglu", dtype)


def test_no_rows_at_all() -> None:
    check([0, 0, 0], 13, 17, 16, "swiglu", torch.float32)
    topology = experts.topologies(torch.zeros(0, dtype=torch.int32), 2, 5, 16, "relu")
    nothing, ids = torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64)
    w_up, w_down = torch.ones(2, 7, 5), torch.ones(2, 5, 7)
    arguments = nothing, ids, torch.zeros(0), w_up, w_down
    out, z = experts.forward(*arguments, topology, "relu")
    assert (out.shape, z.shape) == ((0, 7), (0, 5))
    _, _, dw_up, dw_down = experts.backward(out, *arguments, z, topology, "relu")
    assert not dw_up.any()
    assert not dw_down.any()


def test_gradients_of_matrices_have_their_own_type() -> None:
    """fp32 parameters of a bf16 layer: what the products sum is not rounded to bf16 on the way."""
    ids_R, weights_R, experts_B = rows_of([7, 23], 11, 16, seed=1)
    torch.manual_seed(0)
    source, w_up, w_down = torch.randn(11, 13).bfloat16(), torch.randn(2, 13, 34), torch.randn(2, 17, 13)
    dout = torch.randn(ids_R.shape[0], 13).bfloat16()
    topology = experts.topologies(experts_B, 2, 17, 16, "swiglu")
    out, z = experts.forward(source, ids_R, weights_R, w_up, w_down, topology, "swiglu")
    assert out.dtype is z.dtype is torch.bfloat16
    got = experts.backward(dout, source, ids_R, weights_R, w_up, w_down, z, topology, "swiglu")
    rounded = experts.backward(
        dout, source, ids_R, weights_R, w_up.bfloat16(), w_down.bfloat16(), z, topology, "swiglu"
    )
    for one, other in zip(got[2:], rounded[2:], strict=True):
        assert one.dtype is torch.float32
        assert not torch.equal(one, other.float())
        close(other, one.double(), 2**-7)


def test_what_does_not_fit_is_refused() -> None:
    experts_B = torch.zeros(2, dtype=torch.int32)
    topology = experts.topologies(experts_B, 1, 5, 16, "relu")
    ids, weights, w_up, w_down = (
        torch.zeros(32, dtype=torch.int64),
        torch.ones(32),
        torch.ones(1, 7, 5),
        torch.ones(1, 5, 7),
    )
    source = torch.ones(3, 7)
    with pytest.raises(ValueError, match=r"the ids of rows is \(31,\), what it goes with needs \(32,\)"):
        experts.forward(source, ids[1:], weights, w_up, w_down, topology, "relu")
    with pytest.raises(ValueError, match=r"the right operand is \(2, 7, 5\), .* needs \(1, 7, 5\)"):
        experts.forward(source, ids, weights, w_up.expand(2, 7, 5), w_down, topology, "relu")
    with pytest.raises(ValueError, match="take bf16, fp16 and fp32, not float64"):
        experts.forward(source.double(), ids, weights, w_up, w_down, topology, "relu")
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        experts.topologies(experts_B, 1, 5, 16, "tanh")
    assert {case[-1] for case in CASES} == {*GATED, *PLAIN}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_layer_of_random_sizes(seed: int) -> None:
    generator = random.Random(seed)
    counts = cases.counts_of(generator)
    model, hidden = cases.sizes(generator, 2, 256 if len(counts) < 10 else 32)
    dtype = generator.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    activation = (GATED + PLAIN)[seed % 8]
    check(counts, model, hidden, generator.choice([16, 32, 64]), activation, dtype)
