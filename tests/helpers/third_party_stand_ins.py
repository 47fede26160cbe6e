"""Stand-ins for products of ``scattermoe`` and ``stanford-stk``: their signatures, computed by plain torch.

They read their operands as the packages' kernels do, so that adapters are tested where the packages are
missing. ``test_third_party.py`` compares the signatures where they are installed; that the real ones compute
the same, the ladder's self-test finds before their first use.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import Tensor

M = 128  # rows and columns of a block of stanford-stk


def scatter2scatter(
    X, W, sorted_expert_idxs, sorted_scattered_idxs, k, b=None, x_grouped=False, y_grouped=False, out=None
):
    """Grouped in and out only; rows of expert E are zero."""
    assert (k, b, x_grouped, y_grouped) == (1, None, True, True)
    assert len(sorted_expert_idxs) == len(sorted_scattered_idxs) == len(X)
    assert (sorted_expert_idxs.diff() >= 0).all()
    out = X.new_empty(len(X), W.shape[2]) if out is None else out
    out.zero_()
    for expert, matrix in enumerate(W):
        rows = sorted_expert_idxs == expert
        out[rows] = X[rows] @ matrix
    return out


def group_bwd_W(DY, X, expert_offsets, E, has_bias=False):
    """(the gradient [E, X's width, DY's width], transposed in memory; no bias's)."""
    assert not has_bias
    assert len(expert_offsets) == E
    dw = torch.zeros(E, DY.shape[1], X.shape[1], dtype=DY.dtype).permute(0, 2, 1)
    starts = [0, *expert_offsets.tolist()]
    for expert in range(E):
        rows = slice(starts[expert], starts[expert + 1])
        dw[expert] = X[rows].t() @ DY[rows]
    return dw, None


def sdd(lhs, rhs, shape, out, offsets, row_indices, column_indices):
    """Blocks of lhs @ rhs."""
    assert shape == (lhs.shape[0], rhs.shape[1])
    assert {t.dtype for t in (offsets, row_indices, column_indices)} == {torch.int32}
    for block, (row, column) in enumerate(zip(row_indices.tolist(), column_indices.tolist(), strict=True)):
        out[block] = _rows(lhs, row) @ _rows(rhs.t(), column).t()


def dsd(
    shape, data, offsets, row_indices, column_indices, offsets_t, column_indices_t, block_offsets_t,
    transpose_a, rhs, out,
):  # fmt: skip
    """The sparse matrix, or transposed, times ``rhs``."""
    assert shape == (out.shape[0], rhs.shape[0])
    ends, columns = (offsets_t, column_indices_t) if transpose_a else (offsets, column_indices)
    assert len(ends) == out.shape[0] // M + 1
    for row, (first, last) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        total = rhs.new_zeros(M, rhs.shape[1], dtype=torch.promote_types(rhs.dtype, torch.float32))
        for place in range(first, last):
            block = data[int(block_offsets_t[place])].t() if transpose_a else data[place]
            total += block.to(total.dtype) @ _rows(rhs, int(columns[place])).to(total.dtype)
        _rows(out, row).copy_(total)


def _rows(x: Tensor, block: int) -> Tensor:
    return x[block * M : (block + 1) * M]


STAND_INS = {
    "scattermoe.kernels.ops": (scatter2scatter, group_bwd_W),
    "stk.backend.triton_kernels": (sdd, dsd),
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make both packages importable, as long as the test lasts."""
    for path, functions in STAND_INS.items():
        parent = None
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:depth]))
            module.__spec__, module.__path__ = ModuleSpec(module.__name__, None), []  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, module.__name__, module)
            if parent is not None:
                setattr(parent, parts[depth - 1], module)
            parent = module
        for function in functions:
            setattr(parent, function.__name__, function)
