"""Grouped products and the ordered sum of rows, against plain loops.

Shapes: R rows, E groups, K inner, N outer; T output tokens, D width.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.ops import gather_rows, gather_sum, grouped_mm

COUNTS = [[3, 5, 2], [0, 7, 0, 1], [0, 0], [11], [1, 0, 0, 13, 2, 0]]


def by_hand(rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    experts = [e for e, c in enumerate(counts) for _ in range(c)]
    return (
        torch.stack([rows[r] @ weights[e] for r, e in enumerate(experts)]) if experts else rows @ weights[0]
    )


def run(rows: Tensor, weights: Tensor, counts: list[int], how: str) -> dict[str, Tensor]:
    leaves = [t.clone().requires_grad_() for t in (rows, weights)]
    out = by_hand(*leaves, counts) if how == "by hand" else grouped_mm(*leaves, counts, how)
    cotangent = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    drows, dweights = torch.autograd.grad((out * cotangent).sum(), leaves, materialize_grads=True)
    return {"out": out.detach(), "drows": drows, "dweights": dweights}


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("backend", ["loop", "torch"])
@pytest.mark.parametrize(("inner", "outer"), [(5, 7), (12, 20)])
@pytest.mark.filterwarnings("ignore:grouped_mm")
def test_value_and_gradients(counts: list[int], backend: str, inner: int, outer: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(sum(counts), inner, dtype=torch.float64)
    weights = torch.randn(len(counts), inner, outer, dtype=torch.float64)
    want = run(rows, weights, counts, "by hand")
    torch.testing.assert_close(run(rows, weights, counts, backend), want, rtol=0, atol=1e-12)
    got = run(rows.float(), weights.float(), counts, backend)
    for name in want:
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-5, atol=1e-5)


def test_the_torch_backend_takes_the_grouped_kernel_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("moetrain.ops.say_once"), "_said", set())
    calls, real = [], torch.nn.functional.grouped_mm

    def counted(*args: Tensor, **kwargs: Tensor) -> Tensor:
        calls.append(args[0].dtype)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counted)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        grouped_mm(torch.randn(5, 8).to(dtype), torch.randn(2, 8, 16).to(dtype), [2, 3])
    assert calls == [torch.float32, torch.bfloat16, torch.float16]
    with pytest.warns(UserWarning, match="does not take torch.float64; running one product per group"):
        grouped_mm(torch.randn(5, 8).double(), torch.randn(2, 8, 16).double(), [2, 3])
    # 4 columns of bf16 are 8 bytes: refused, while 4 of fp32 are not
    with pytest.warns(UserWarning, match="multiples of 16 bytes"):
        grouped_mm(torch.randn(5, 8).bfloat16(), torch.randn(2, 8, 4).bfloat16(), [2, 3])
    grouped_mm(torch.randn(5, 8), torch.randn(2, 8, 4), [2, 3])
    assert len(calls) == 4


def test_wrong_operands_are_refused() -> None:
    rows, weights = torch.randn(5, 3), torch.randn(2, 3, 7)
    with pytest.raises(ValueError, match="2 groups of 4 rows, but there are 2 matrices and 5 rows"):
        grouped_mm(rows, weights, [2, 2])
    with pytest.raises(ValueError, match="3 groups of 5 rows"):
        grouped_mm(rows, weights, [2, 2, 1])
    with pytest.raises(ValueError, match="unknown grouped_mm backend 'cublas'; known: loop, torch"):
        grouped_mm(rows, weights, [2, 3], "cublas")


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.integers(0, 5), min_size=0, max_size=9), st.integers(0, 4), st.randoms(use_true_random=False)
)
def test_gather_sum_and_gather_rows(sizes: list[int], padding: int, random: object) -> None:
    """Any number of rows a token, in any order, padding between them; the two are each other's adjoint."""
    tokens = [t for t, size in enumerate(sizes) for _ in range(size)] + [-1] * padding
    random.shuffle(tokens)
    ids_R = torch.tensor(tokens, dtype=torch.int64)
    row_ids_N = torch.tensor([r for t in range(len(sizes)) for r, u in enumerate(tokens) if u == t]).long()
    ends_T = torch.tensor(sizes, dtype=torch.int64).cumsum(0)
    torch.manual_seed(0)
    rows_RD = torch.randn(len(tokens), 3, dtype=torch.float64, requires_grad=True)
    y_TD = gather_sum(rows_RD, row_ids_N, ends_T, ids_R)
    want = torch.zeros(len(sizes), 3, dtype=torch.float64)
    for r, t in enumerate(tokens):
        if t >= 0:
            want[t] += rows_RD.detach()[r]
    torch.testing.assert_close(y_TD.detach(), want, rtol=0, atol=1e-12)
    g_TD = torch.randn_like(want)
    (drows,) = torch.autograd.grad((y_TD * g_TD).sum(), rows_RD)
    assert torch.equal(drows, gather_rows(g_TD, ids_R))
    for r, t in enumerate(tokens):
        assert torch.equal(drows[r], g_TD[t] if t >= 0 else torch.zeros(3, dtype=torch.float64))


def test_a_row_that_no_token_sums_is_refused_backward() -> None:
    """Else the row would be taken for padding, and another one zeroed in its place."""
    rows_RD = torch.ones(3, 2, requires_grad=True)
    y_TD = gather_sum(rows_RD, torch.tensor([0, 2]), torch.tensor([1, 2]), torch.tensor([0, 0, 1]))
    with pytest.raises(IndexError):
        y_TD.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gather_sum_accumulates_in_fp32(dtype: torch.dtype) -> None:
    """A running sum in half precision would stop growing at 256 (bf16) or 2048 (fp16)."""
    rows_RD = torch.ones(4099, 2, dtype=dtype)
    y_TD = gather_sum(rows_RD, torch.arange(4099), torch.tensor([3, 4099]), torch.zeros(4099).long())
    assert torch.equal(y_TD, torch.tensor([[3.0, 3.0], [4096.0, 4096.0]], dtype=dtype))


def test_gather_sum_opcheck() -> None:
    rows_RD = torch.randn(5, 3, requires_grad=True)
    ids_R, row_ids_N = torch.tensor([0, 2, -1, 0, 2]), torch.tensor([0, 3, 1, 4])
    args = (rows_RD, row_ids_N, torch.tensor([2, 2, 4]), ids_R)
    torch.library.opcheck(torch.ops.moetrain.gather_sum.default, args)
