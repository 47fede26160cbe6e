"""Biases of experts against a loop over rows in fp64, on every backend that takes them.

Shapes: X source rows, D model, R rows, E experts, F hidden, P = 2F (gated) or F.
"""

import pytest
import torch
from torch import Tensor

from moetrain.ops.activations import activate, gate_and_up, is_gated
from moetrain.ops.experts import Rows, expert_mlp
from moetrain.ops.experts.case import Case
from moetrain.ops.experts.rows import Segments
from moetrain.ops.experts.table import BACKENDS, why_not

COUNTS, SOURCES, D, F, BLOCK = [17, 0, 5, 1, 29], 31, 16, 12, 8
CPU = torch.device("cpu")


def rows_of(counts: list[int]) -> Rows:
    generator = torch.Generator().manual_seed(sum(counts))
    ids = [torch.randperm(SOURCES, generator=generator)[:n].sort().values for n in counts]
    ids_R = torch.cat([torch.nn.functional.pad(i, (0, -len(i) % BLOCK), value=-1) for i in ids])
    used_N = torch.nonzero(ids_R >= 0)[:, 0]
    order_N = ids_R[used_N].argsort(stable=True)
    ends_X = torch.bincount(ids_R[used_N], minlength=SOURCES).cumsum(0)
    return Rows(ids_R, Segments(torch.tensor(counts), BLOCK, counts), used_N[order_N], ends_X)


def operands(rows: Rows, activation: str, dtype: torch.dtype) -> list[Tensor]:
    """Source, weights, both matrices and both biases."""
    generator = torch.Generator().manual_seed(1)
    experts, columns = rows.segments.num_experts, F * (2 if is_gated(activation) else 1)
    shapes = [
        (SOURCES, D),
        (len(rows.ids_R),),
        (experts, D, columns),
        (experts, F, D),
        (experts, columns),
        (experts, D),
    ]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    made[1] = made[1].abs() * (rows.ids_R >= 0)
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def by_rows(rows: Rows, leaves: list[Tensor], activation: str) -> Tensor:
    source, weights, up, down, bias_up, bias_down = leaves
    out, start = [torch.zeros(D, dtype=torch.float64)] * len(rows.ids_R), 0
    for expert, count in enumerate(rows.segments.aligned):
        for row in range(start, start + count):
            if (x := int(rows.ids_R[row])) >= 0:
                z = (source[x] @ up[expert] + bias_up[expert])[None]
                h = activate(*gate_and_up(z, activation), activation)[0]
                out[row] = weights[row] * (h @ down[expert] + bias_down[expert])
        start += count
    return torch.stack(out)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("activation", ["swiglu_clamped", "relu2"])
@pytest.mark.parametrize("backend", ["cpu", "torch", "loop"])
def test_output_and_every_gradient_are_the_formula(backend: str, activation: str, keep: bool) -> None:
    dtype, tolerance = (torch.float32, 2e-5) if backend == "torch" else (torch.float64, 1e-12)
    rows = rows_of(COUNTS)
    narrow = operands(rows, activation, dtype)
    assert (backend == "loop") or why_not(
        backend, Case(CPU, dtype, D, F, activation, BLOCK, keep, True)
    ) is None
    source, weights, up, down, *biases = narrow
    out = expert_mlp(source, rows, weights, up, down, activation, backend, keep=keep, biases=tuple(biases))
    leaves = [tensor.detach().double().requires_grad_() for tensor in narrow]
    right = by_rows(rows, leaves, activation)
    dout = torch.randn(right.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    dout *= (rows.ids_R >= 0)[:, None]
    grads = torch.autograd.grad(out, narrow, dout.to(dtype))
    used = (rows.ids_R >= 0).double()
    for name, ours, theirs in zip(
        ("out", "source", "weights", "up", "down", "bias up", "bias down"),
        (out, *grads),
        (right, *torch.autograd.grad(right, leaves, dout)),
        strict=True,
    ):
        found = ours.double() * used if name == "weights" else ours.double()
        bound = tolerance * theirs.abs().max().item()
        torch.testing.assert_close(found, theirs, rtol=0, atol=bound, msg=lambda m, name=name: f"{name}: {m}")
    for gradient in grads[2:]:
        assert not gradient[1].any()  # of the expert without rows


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_no_rows_at_all(backend: str) -> None:
    rows = rows_of([0, 0, 0])
    leaves = operands(rows, "swiglu", torch.float32)
    out = expert_mlp(leaves[0], rows, *leaves[1:4], "swiglu", backend, biases=(leaves[4], leaves[5]))
    assert out.shape == (0, D)
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("name", ["triton", "triton_block_sparse", "megablocks"])
def test_kernels_that_add_none_refuse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetrain.ops.experts.triton_cases.device_refusal", lambda device: None)
    case = Case(torch.device("cuda"), torch.bfloat16, 128, 128, "swiglu_clamped", 128, bias=True)
    assert BACKENDS[name].refusal(case) == "it adds no biases (experts.bias)"
