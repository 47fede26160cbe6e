"""Biases of experts, and low-rank products beside their matrices too, against a loop over rows in fp64, on
every backend that takes them.

Shapes: X source rows, D model, R rows, E experts, F hidden, P = 2F (gated) or F, L rank of a product.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moetrain.ops.activations import activate, gate_and_up, is_gated
from moetrain.ops.experts import Rows, expert_mlp
from moetrain.ops.experts.case import Case
from moetrain.ops.experts.operands import Pair
from moetrain.ops.experts.rows import Segments
from moetrain.ops.experts.table import BACKENDS, why_not

COUNTS, SOURCES, D, F, L, BLOCK = [17, 0, 5, 1, 29], 31, 16, 12, 4, 8
NAMES = ("source", "weights", "up", "down", "bias up", "bias down", "a up", "b up", "a down", "b down")
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
    """Source, weights, both matrices, both biases, and the factors of both products."""
    generator = torch.Generator().manual_seed(1)
    experts, columns = rows.segments.num_experts, F * (2 if is_gated(activation) else 1)
    shapes = [
        (SOURCES, D),
        (len(rows.ids_R),),
        (experts, D, columns),
        (experts, F, D),
        (experts, columns),
        (experts, D),
        *((experts, D, L), (experts, L, columns), (experts, F, L), (experts, L, D)),
    ]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    made[1] = made[1].abs() * (rows.ids_R >= 0)
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def by_rows(rows: Rows, leaves: list[Tensor], activation: str) -> Tensor:
    source, weights, up, down, bias_up, bias_down, *factors = leaves
    if factors:
        up, down = up + factors[0] @ factors[1], down + factors[2] @ factors[3]
    out, start = [torch.zeros(D, dtype=torch.float64)] * len(rows.ids_R), 0
    for expert, count in enumerate(rows.segments.aligned):
        for row in range(start, start + count):
            if (x := int(rows.ids_R[row])) >= 0:
                z = (source[x] @ up[expert] + bias_up[expert])[None]
                h = activate(*gate_and_up(z, activation), activation)[0]
                out[row] = weights[row] * (h @ down[expert] + bias_down[expert])
        start += count
    return torch.stack(out)


def computed(rows: Rows, leaves: list[Tensor], activation: str, backend: str, keep: bool) -> Tensor:
    source, weights, up, down, bias_up, bias_down, *factors = leaves
    pairs = [Pair(*factors[at : at + 2]) for at in (0, 2)] if factors else []
    biases = (bias_up, bias_down)
    return expert_mlp(source, rows, weights, up, down, activation, backend, None, keep, biases, *pairs)


@pytest.mark.parametrize("trained", [True, False], ids=["all trained", "matrices and biases frozen"])
@pytest.mark.parametrize("added", [False, True], ids=["alone", "products"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("activation", ["swiglu_clamped", "relu2"])
@pytest.mark.parametrize("backend", ["cpu", "torch", "loop"])
def test_output_and_every_gradient_are_the_formula(
    backend: str, activation: str, keep: bool, added: bool, trained: bool
) -> None:
    dtype, tolerance = (torch.float32, 2e-5) if backend == "torch" else (torch.float64, 1e-12)
    rows, number = rows_of(COUNTS), 10 if added else 6
    narrow = operands(rows, activation, dtype)[:number]
    case = Case(CPU, dtype, D, F, activation, BLOCK, keep, True, added)
    assert (backend == "loop") or why_not(backend, case) is None
    wanted = [place for place in range(number) if trained or place not in range(2, 6)]
    for place, leaf in enumerate(narrow):
        leaf.requires_grad_(place in wanted)
    out = computed(rows, narrow, activation, backend, keep)
    leaves = [tensor.detach().double().requires_grad_() for tensor in narrow]
    right = by_rows(rows, leaves, activation)
    dout = torch.randn(right.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    dout *= (rows.ids_R >= 0)[:, None]
    grads = torch.autograd.grad(out, [narrow[place] for place in wanted], dout.to(dtype))
    theirs = torch.autograd.grad(right, [leaves[place] for place in wanted], dout)
    used = (rows.ids_R >= 0).double()
    names = ["out", *(NAMES[place] for place in wanted)]
    for name, ours, exact in zip(names, (out, *grads), (right, *theirs), strict=True):
        found = ours.double() * used if name == "weights" else ours.double()
        bound = tolerance * exact.abs().max().item()
        torch.testing.assert_close(found, exact, rtol=0, atol=bound, msg=lambda m, name=name: f"{name}: {m}")
    for gradient in grads[2:]:
        assert not gradient[1].any()  # of the expert without rows


@pytest.mark.parametrize("added", [False, True], ids=["alone", "products"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_no_rows_at_all(backend: str, added: bool) -> None:
    rows = rows_of([0, 0, 0])
    leaves = operands(rows, "swiglu", torch.float32)[: 10 if added else 6]
    out = computed(rows, leaves, "swiglu", backend, keep=True)
    assert out.shape == (0, D)
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("name", ["triton", "triton_block_sparse", "megablocks"])
def test_kernels_that_add_none_refuse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetrain.ops.experts.triton_cases.device_refusal", lambda device: None)
    case = Case(torch.device("cuda"), torch.bfloat16, 128, 128, "swiglu_clamped", 128, bias=True)
    assert BACKENDS[name].refusal(case) == "it adds no biases (experts.bias)"
    beside = replace(case, bias=False, added=True)
    assert why_not(name, beside) == "it has no low-rank products beside the matrices"
    assert why_not(name, replace(beside, bias=True)) == "it has no low-rank products beside the matrices"
