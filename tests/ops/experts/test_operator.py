"""The experts' operator: what it keeps for backward, its registration, abstract runs, edge layouts.

Shapes: X source rows, D model, R rows (N useful), E experts, F hidden, P = 2F (gated) or F.
"""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from operator_cases import operands, rows_of, saved_bytes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moetrain.moe.assignment import Assignment
from moetrain.moe.dispatch.plan import layout
from moetrain.ops import Rows, Segments, expert_mlp, gather_sum
from moetrain.ops.activations import (
    ACTIVATIONS,
    activate,
    activate_again,
    activate_backward,
    gate_and_up,
    is_gated,
)
from moetrain.ops.cpu.per_expert import kept_rows


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("counts", "num_source", "d", "f", "block", "activation"),
    [([17, 0, 5, 29, 2], 29, 12, 20, 8, "swiglu"), ([3, 1, 0, 0, 11, 7, 2], 13, 28, 4, 32, "relu2")],
)
def test_backward_keeps_source_weights_preactivation_and_indices(
    counts: list[int], num_source: int, d: int, f: int, block: int, activation: str, backend: str
) -> None:
    rows = rows_of(counts, num_source, block)
    p = 2 * f if is_gated(activation) else f
    source, weights, up, down = operands(rows, num_source, d, f, torch.float32, is_gated(activation))
    with saved_bytes() as kept:
        out = expert_mlp(source, rows, weights, up, down, activation, backend)
        y = gather_sum(out, rows.by_source_N, rows.ends_X, rows.ids_R)
    r, n, e = len(rows.ids_R), sum(counts), len(counts)
    assert r == sum(-(-c // block) * block for c in counts)
    z_rows = sum(kept_rows(rows.segments, r, torch.float32)) if backend == "cpu" else r
    floats = num_source * d + r + z_rows * p + e * d * p + e * f * d
    indices = r + n + num_source + e  # the row's source, and the way back, which combine needs too
    assert sum(kept.values()) == 4 * floats + 8 * indices
    y.sum().backward()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_bf16_keeps_the_casts_of_the_source_only(backend: str) -> None:
    rows = rows_of([17, 0, 5, 29, 2], 29, 8)
    source, weights, up, down = operands(rows, 29, 16, 24, torch.float32)
    with saved_bytes() as kept:
        out = expert_mlp(source, rows, weights, up, down, "swiglu", backend, torch.bfloat16)
    r, n = len(rows.ids_R), 53
    z_rows = 17 + 5 + 29 + 2 if backend == "cpu" else r  # a handful of rows has no padding
    assert sum(kept.values()) == 2 * (29 * 16 + z_rows * 48) + 4 * (r + 5 * 16 * 72) + 8 * (r + n + 29 + 5)
    out.sum().backward()
    assert up.grad.dtype == down.grad.dtype == source.grad.dtype == weights.grad.dtype == torch.float32


def test_backward_makes_no_gradient_for_the_preactivation() -> None:
    """The operator returns z beside its output; autograd would else fill a zero tensor of z's size."""
    rows = rows_of([17, 5, 29], 29, 8)
    out = expert_mlp(rows=rows, activation="swiglu", **named_operands(rows, 29, 12, 20, torch.float32))
    with torch.profiler.profile(record_shapes=True) as profile:
        out.sum().backward()
    zeroed = [e.input_shapes[0] for e in profile.events() if e.name in ("aten::zero_", "aten::fill_")]
    assert zeroed
    assert [len(rows.ids_R), 40] not in zeroed


def named_operands(rows: Rows, num_source: int, d: int, f: int, dtype: torch.dtype) -> dict[str, Tensor]:
    source, weights, up, down = operands(rows, num_source, d, f, dtype)
    return {"source_XD": source, "weights_R": weights, "w_up_EDP": up, "w_down_EFD": down}


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_weights_gradient_is_an_inner_product(backend: str) -> None:
    """<dout W_down^T, act(z)> stands in for <dout, act(z) W_down>, which is not kept."""
    rows = rows_of([7, 0, 3, 11], 11, 8)
    source, weights, up, down = operands(rows, 11, 8, 4, torch.float64 if backend == "cpu" else torch.float32)
    dout = torch.randn(len(rows.ids_R), 8, dtype=source.dtype) * (rows.ids_R >= 0)[:, None]
    expert_mlp(source, rows, weights, up, down, "swiglu", backend).backward(dout)
    experts_R = torch.repeat_interleave(torch.arange(4), torch.tensor(rows.segments.aligned))
    for r in torch.nonzero(rows.ids_R >= 0).view(-1).tolist():
        e, x = int(experts_R[r]), source.detach()[rows.ids_R[r]].double()
        y = oracle.feed_forward(x, up.detach()[e].double(), down.detach()[e].double(), "swiglu")
        tolerance = 1e-10 if backend == "cpu" else 1e-4
        assert float(weights.grad[r]) == pytest.approx(float(dout[r].double() @ y), abs=tolerance)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_opcheck_of_the_operator(backend: str, biased: bool) -> None:
    rows = rows_of([5, 0, 3], 7, 4)
    source, weights, up, down = operands(rows, 7, 8, 4, torch.float32)
    biases = [torch.randn(3, n).requires_grad_() for n in (8, 8)] if biased else [None, None]
    indices = (rows.by_source_N, rows.ends_X, rows.segments.counts_E)
    static = (list(rows.segments.on_host), rows.segments.block, "swiglu", True, backend)
    forward = (source, rows.ids_R, weights, up, down, *biases, *indices, *static)
    torch.library.opcheck(torch.ops.moetrain.expert_mlp.default, forward)
    plain = [t.detach() if isinstance(t, Tensor) else t for t in forward]
    out, z = torch.ops.moetrain.expert_mlp(*plain)
    backward = (torch.randn_like(out), z, *plain)
    checks = ("test_schema", "test_faketensor")  # it has no derivative of its own
    for trained in (True, False):
        torch.library.opcheck(
            torch.ops.moetrain.expert_mlp_backward.default, (*backward, trained), test_utils=checks
        )


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_opcheck_of_the_operator_with_products(backend: str) -> None:
    rows = rows_of([5, 0, 3], 7, 4)
    source, weights, up, down = operands(rows, 7, 8, 4, torch.float32)
    factors = [torch.randn(3, *shape).requires_grad_() for shape in ((8, 4), (4, 8), (4, 4), (4, 8))]
    indices = (None, None, rows.by_source_N, rows.ends_X, rows.segments.counts_E)
    static = (list(rows.segments.on_host), rows.segments.block, "swiglu", True, backend)
    forward = (factors, source, rows.ids_R, weights, up, down, *indices, *static)
    torch.library.opcheck(torch.ops.moetrain.expert_mlp_added.default, forward)
    plain = [t.detach() if isinstance(t, Tensor) else t for t in forward[1:]]
    factors = [factor.detach() for factor in factors]
    out, z = torch.ops.moetrain.expert_mlp_added(factors, *plain)
    checks = ("test_schema", "test_faketensor")
    for trained in (True, False):
        backward = (torch.randn_like(out), z, factors, *plain, trained)
        torch.library.opcheck(
            torch.ops.moetrain.expert_mlp_added_backward.default, backward, test_utils=checks
        )


def fake_rows(counts: list[int], num_source: int, block: int) -> Rows:
    aligned = [-(-c // block) * block for c in counts]
    ids_R = torch.zeros(sum(aligned), dtype=torch.int64)
    by_source_N = torch.zeros(sum(counts), dtype=torch.int64)
    segments = Segments(torch.tensor(counts), block, counts)
    return Rows(ids_R, segments, by_source_N, torch.zeros(num_source, dtype=torch.int64))


@pytest.mark.parametrize("backend", ["loop", "cpu", "torch"])
def test_abstract_run_beyond_int32_elements(backend: str) -> None:
    """Forward and backward with fake tensors, at a size where an expert's offset passes 2^31."""
    experts, d, f = 17, 16384, 8200
    assert experts * d * f > 2**31
    counts = [3] * experts
    with FakeTensorMode():
        rows = fake_rows(counts, 97, 8)
        source, weights, up, down = operands(rows, 97, d, f, torch.float32)
        out = expert_mlp(source, rows, weights, up, down, "swiglu", backend, torch.bfloat16)
        assert (out.shape, out.dtype) == ((8 * experts, d), torch.bfloat16)
        gather_sum(out, rows.by_source_N, rows.ends_X, rows.ids_R).sum().backward()
    for t in (source, weights, up, down):
        assert (t.grad.shape, t.grad.dtype) == (t.shape, t.dtype)


def test_index_vectors_are_64_bit() -> None:
    rows = rows_of([5, 0, 3], 7, 4)
    assert {t.dtype for t in (rows.ids_R, rows.by_source_N, rows.ends_X)} == {torch.int64}


def test_layout_of_a_worked_example() -> None:
    counts_E = torch.tensor([3, 0, 2])
    assignment = Assignment(torch.tensor([0, 1, 3, 0, 2]), torch.ones(5), counts_E)
    rows, slots_N = layout(
        assignment.token_ids_N,
        assignment.counts_E,
        assignment.counts_E.tolist(),
        5,
        4,
    )
    assert rows.ids_R.tolist() == [0, 1, 3, -1, 0, 2, -1, -1]
    assert (list(rows.segments.on_host), rows.segments.aligned) == ([3, 0, 2], [4, 0, 4])
    assert slots_N.tolist() == [0, 1, 2, 4, 5]
    assert rows.by_source_N.tolist() == [0, 4, 1, 5, 2]  # rows of token 0, 1, 2, 3; token 4 has none
    assert rows.ends_X.tolist() == [2, 3, 4, 5, 5]


@pytest.mark.parametrize("backend", ["loop", "cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_rows_do_not_matter(backend: str, dtype: torch.dtype) -> None:
    """Their output is zero, and what memory held before never reaches a result."""
    rows, bare = rows_of([5, 0, 3], 7, 8), rows_of([5, 0, 3], 7, 1)
    source, weights, up, down = operands(rows, 7, 8, 8, torch.float32)

    def run(layout_rows: Rows) -> dict[str, Tensor]:
        poison = [torch.full((64, 64), float("nan")) for _ in range(64)]
        del poison  # freed memory that new_empty may hand out again
        kept = weights.detach()[rows.ids_R >= 0]
        row_weights = torch.zeros(len(layout_rows.ids_R)).masked_scatter(layout_rows.ids_R >= 0, kept)
        leaves = [t.detach().clone().requires_grad_() for t in (source, row_weights, up, down)]
        out = expert_mlp(leaves[0], layout_rows, *leaves[1:], "swiglu", backend, dtype)
        assert not out[layout_rows.ids_R < 0].any()
        y = gather_sum(out, layout_rows.by_source_N, layout_rows.ends_X, layout_rows.ids_R)
        y.float().square().sum().backward()
        grads = [leaf.grad for leaf in leaves]
        assert not grads[1][layout_rows.ids_R < 0].any()
        assert not grads[2][1].any()
        assert not grads[3][1].any()
        grads[1] = grads[1][layout_rows.ids_R >= 0]
        return dict(zip(["y", "dx", "dw", "dup", "ddown"], [y.detach().float(), *grads], strict=True))

    # another block is another shape of product, so only its order of summation may differ
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for name, want in (one := run(rows)).items():
        assert torch.isfinite(want).all(), name
        other = run(bare)[name]
        assert (want - other).norm() <= tolerance * other.norm(), name
    assert one


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_written_backward(name: str) -> None:
    torch.manual_seed(0)
    width = 14 if is_gated(name) else 7
    z = torch.cat([torch.randn(5, width), 8 * torch.randn(4, width)]).double().requires_grad_()
    h, dh = activate(*gate_and_up(z, name), name), torch.randn(9, 7, dtype=torch.float64)
    identity = torch.eye(7, dtype=torch.float64)
    want = torch.stack([oracle.feed_forward(row, torch.eye(width).double(), identity, name) for row in z])
    torch.testing.assert_close(h, want, rtol=0, atol=1e-12)
    dz = torch.full_like(z, float("nan"))
    again, active = activate_again(*gate_and_up(z.detach(), name), name)
    assert torch.equal(again, h)
    gate, up = gate_and_up(z.detach(), name)
    activate_backward(dh.clone(), gate, up, active, name, *gate_and_up(dz, name))
    torch.testing.assert_close(dz, torch.autograd.grad((want * dh).sum(), z)[0], rtol=0, atol=1e-12)


def test_unknown_names_are_refused() -> None:
    rows = rows_of([1], 1, 1)
    values: Any = operands(rows, 1, 3, 2)
    with pytest.raises(ValueError, match="unknown experts backend 'cuda'; known: auto"):
        expert_mlp(values[0], rows, *values[1:], "swiglu", "cuda")
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        is_gated("tanh")


def test_row_counts_of_one_size_share_kernels_and_pad_little() -> None:
    """oneDNN keeps a compiled kernel for every row count that it has met."""
    computed = {
        n: kept_rows(Segments(torch.tensor([n]), 32, [n]), 0, torch.float32)[0] for n in range(1, 1025)
    }
    assert all(n <= rows <= max(n + 7, n * 17 / 16) for n, rows in computed.items())
    assert all(rows == n for n, rows in computed.items() if n < 32)
    for smallest in (32, 64, 128, 256, 512):
        assert len({computed[n] for n in range(smallest + 1, 2 * smallest + 1)}) <= 16
