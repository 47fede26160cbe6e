"""The experts' feed-forward in grouped kernels against the twin in fp64, forward and each gradient.

Shapes: X source rows, D model, E experts, F hidden, P = 2F or F, R block-aligned rows.
"""

from __future__ import annotations

import kernel_cases
import pytest
import torch
from kernel_cases import Case
from torch import Tensor

from moetrain.kernels import activations, grouped, metadata
from moetrain.kernels.grouped import weight_gradient as weight_gradients
from moetrain.kernels.twins import grouped as twins

NAMES = activations.GATED + activations.PLAIN
# Largest relative error in units of the norm of a row or a matrix: the sums are fp32, what is stored is not.
ERROR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
RANDOM = [(kernel_cases.random_case(s, 90, e), *dims) for s, e, dims in (
    (1, 1, (17, 31)), (2, 3, (53, 13)), (3, 11, (7, 37)), (4, 61, (11, 5)),
)]  # fmt: skip

CASES = [*((case, 23, 7) for case in kernel_cases.EDGES), *RANDOM]


def many() -> list[tuple[Case, int, int]]:
    """One width of each is small: the interpreter takes a second for a hundred tiles."""
    g = torch.Generator().manual_seed(5)
    dims = torch.stack([torch.randint(0, most, (104,), generator=g) for most in (18, 6)], 1)
    primes = kernel_cases.PRIMES
    widths = [(primes[i], primes[j])[:: 1 if s % 2 else -1] for s, (i, j) in enumerate(dims.tolist())]
    found = [(kernel_cases.random_case(s, 60), *each) for s, each in enumerate(widths)]
    return [
        *found,
        (Case((3, 0, 20), 23), 251, 3),
        (Case((0, 19), 29), 2, 241),
        (kernel_cases.random_case(4, 90, 160), 11, 5),
    ]


def operands(case: Case, depth: int, hidden: int, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(17)
    columns = hidden * (2 if activations.is_gated(name) else 1)
    shapes = {
        "source": (case.num_source, depth),
        "w_up": (len(case.counts), depth, columns),
        "w_down": (len(case.counts), hidden, depth),
        "dy": (case.num_source, depth),
    }
    return {key: (torch.randn(shape, generator=g) / 2).to(dtype) for key, shape in shapes.items()}


def fenced(x: Tensor) -> Tensor:
    """A copy whose neighbours in memory are no numbers, so that nobody may read them."""
    room = x.new_full((x.shape[0] + 2, *x.shape[1:]), torch.nan)
    room[1:-1] = x
    return room[1:-1]


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype, name: str) -> None:
    """Each element within the error of its type, relative to the largest of ``want``."""
    if want.numel():
        error = (got.double().cpu() - want).abs().max()
        assert error <= ERROR[dtype] * want.abs().max().clamp(min=1e-3), (name, float(error))


def check(
    case: Case,
    depth: int,
    hidden: int,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    block: int = 16,
    gathered: bool = True,
    keep: bool = True,
) -> None:
    token_ids_N, weights_N, counts_E = kernel_cases.assignment(case, device)
    meta, weights_R = metadata.lay_out(token_ids_N, weights_N, counts_E, block, case.num_source)
    tensors = operands(case, depth, hidden, name, dtype)
    source, w_up, w_down, dy = (fenced(t.to(device)) for t in tensors.values())
    out, z = grouped.forward(source, meta, weights_R, w_up, w_down, name, keep=keep)
    used = int(meta.block_starts_E1[-1]) * block
    if z is not None:
        z[used:] = torch.nan
    dout = dy if gathered else twins.gather(dy, meta.ids_R)
    grads = grouped.backward(dout, source, meta, weights_R, w_up, w_down, z, name, gathered=gathered)

    ids_R, experts_B = meta.ids_R[:used].cpu(), meta.block_expert_B[: used // block].cpu()
    leaves = [t.double().requires_grad_() for t in (
        twins.gather(tensors["source"], ids_R) if used else tensors["source"][:0],
        weights_R[:used].cpu(), tensors["w_up"], tensors["w_down"],
    )]  # fmt: skip
    if used:
        want_out, want_z = twins.forward(leaves[0], experts_B, *leaves[1:], name)
        cotangent = twins.gather(tensors["dy"].double(), ids_R)
        want = torch.autograd.grad((want_out * cotangent).sum(), leaves)
        assert_close(out[:used], want_out.detach(), dtype, "out")
        if z is not None:
            assert_close(z[:used], want_z.detach(), dtype, "z")
    else:
        want = tuple(torch.zeros_like(leaf) for leaf in leaves)
    real = ids_R >= 0
    assert grads[1][used:].eq(0).all()
    assert grads[1][:used].cpu()[~real].eq(0).all()
    assert_close(grads[1][:used].cpu()[real], want[1][real], dtype, "dweights")
    assert_close(grads[0][:used], want[0], dtype, "dx")
    for key, got, expected in zip(("dw_up", "dw_down"), grads[2:], want[2:], strict=True):
        assert_close(got, expected, dtype, key)
        assert got.dtype is dtype
        assert got[counts_E == 0].eq(0).all()


@pytest.mark.parametrize(("case", "depth", "hidden"), CASES, ids=str)
def test_forward_and_gradients(case: Case, depth: int, hidden: int, device: torch.device) -> None:
    check(case, depth, hidden, "swiglu", torch.float32, device)


@pytest.mark.parametrize(("case", "depth", "hidden"), RANDOM[:2], ids=str)
def test_forward_and_gradients_in_fp16(case: Case, depth: int, hidden: int, device: torch.device) -> None:
    check(case, depth, hidden, "geglu", torch.float16, device)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "depth", "hidden"), many(), ids=str)
def test_many_shapes(case: Case, depth: int, hidden: int, device: torch.device) -> None:
    dtype = torch.float16 if depth % 3 == 1 else torch.float32
    check(case, depth, hidden, NAMES[(depth + hidden) % len(NAMES)], dtype, device)


@pytest.mark.parametrize("name", NAMES)
def test_each_activation(name: str, device: torch.device) -> None:
    check(Case((0, 18, 5), 19), 13, 17, name, torch.float32, device)


def test_bf16(device: torch.device) -> None:
    check(Case((0, 18, 5), 19), 37, 17, "swiglu", torch.bfloat16, device)


def test_gradients_of_rows_and_z_computed_anew(device: torch.device) -> None:
    check(Case((0, 18, 5), 19), 23, 7, "geglu", torch.float32, device, gathered=False, keep=False)


def test_blocks_of_several_tiles(device: torch.device) -> None:
    check(Case((0, 47, 5), 53), 13, 17, "swiglu", torch.float32, device, block=64)


def test_chunks_of_rows_are_summed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also more chunks than an expert has blocks."""
    monkeypatch.setattr(weight_gradients, "num_chunks", lambda *_: 3)
    check(Case((0, 97, 5), 101), 13, 17, "relu2", torch.float32, device)


def test_two_runs_are_equal_bit_for_bit(device: torch.device) -> None:
    case = Case((5, 0, 18), 19)
    token_ids_N, weights_N, counts_E = kernel_cases.assignment(case, device)
    tensors = operands(case, 17, 13, "swiglu", torch.float32)
    source, w_up, w_down, dy = (t.to(device) for t in tensors.values())
    results = []
    for _ in range(2):
        meta, weights_R = metadata.lay_out(token_ids_N, weights_N, counts_E, 16, case.num_source)
        used = int(meta.block_starts_E1[-1]) * 16
        out, z = grouped.forward(source, meta, weights_R, w_up, w_down, "swiglu")
        dx, *rest = grouped.backward(dy, source, meta, weights_R, w_up, w_down, z, "swiglu", gathered=True)
        results.append([out[:used], dx[:used], *rest])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_matrices_and_weights_of_other_types(device: torch.device) -> None:
    """They are cast as they are read, and their gradients come back in their own types."""
    case = Case((5, 0, 18), 19)
    token_ids_N, weights_N, counts_E = kernel_cases.assignment(case, device)
    tensors = operands(case, 19, 23, "swiglu", torch.float16)
    source, w_up, w_down, dy = (t.to(device) for t in tensors.values())
    meta, weights_R = metadata.lay_out(token_ids_N, weights_N, counts_E, 16, case.num_source)
    want, _ = grouped.forward(source, meta, weights_R, w_up, w_down, "swiglu")
    got, z = grouped.forward(source, meta, weights_R, w_up.float(), w_down.float(), "swiglu")
    used = int(meta.block_starts_E1[-1]) * 16
    assert torch.equal(got[:used], want[:used])
    grads = grouped.backward(dy, source, meta, weights_R, w_up.float(), w_down.float(), z, "swiglu", True)
    assert [g.dtype for g in grads] == [torch.float16, torch.float32, torch.float32, torch.float32]


def test_what_kernels_do_not_take_is_refused(device: torch.device) -> None:
    case = Case((5, 0), 7)
    token_ids_N, weights_N, counts_E = kernel_cases.assignment(case, device)
    meta, weights_R = metadata.lay_out(token_ids_N, weights_N, counts_E, 16, case.num_source)
    source, w_up, w_down, dy = (t.to(device) for t in operands(case, 3, 5, "swiglu", torch.float32).values())
    with pytest.raises(ValueError, match="not float64"):
        grouped.forward(source.double(), meta, weights_R, w_up, w_down, "swiglu")
    with pytest.raises(ValueError, match="w_up are float64"):
        grouped.forward(source, meta, weights_R, w_up.double(), w_down, "swiglu")
    with pytest.raises(ValueError, match="relu and rows of 2 experts do not fit"):
        grouped.forward(source, meta, weights_R, w_up, w_down, "relu")
    with pytest.raises(ValueError, match=r"dout is \[7, 3\] in float16, not \[7, 3\] in"):
        grouped.backward(dy.half(), source, meta, weights_R, w_up, w_down, None, "swiglu", True)
    with pytest.raises(ValueError, match=r"not one for each of 48 rows"):
        grouped.forward(source, meta, weights_N, w_up, w_down, "swiglu")
