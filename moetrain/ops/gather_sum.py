"""Sum chosen rows into each output token, in a fixed order, without atomics.

Shapes: R rows, D width, T output tokens, N (row, token) pairs grouped by token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.ops import self_test
from moetrain.ops.kernel_or_torch import AUTO, Step
from moetrain.ops.triton_support import KERNEL_DTYPES

_TILE, _SMALL, _SMALL_GPU = 16, 32, 1040  # widths of a self-test: of several blocks of columns
_NO_ROW = 2**62  # refused as an index, should there be fewer padding rows than rows that no token sums


@torch.library.custom_op("moetrain::gather_sum", mutates_args=())
def _gather_sum(
    rows_RD: Tensor, row_ids_N: Tensor, ends_T: Tensor, token_ids_R: Tensor, backend: str = AUTO
) -> Tensor:
    if rows_RD.shape[0] == 0:
        return rows_RD.new_zeros(ends_T.shape[0], rows_RD.shape[1])
    if _STEP.by_kernel(backend, rows_RD.device, (rows_RD.dtype, rows_RD.shape[1] % _TILE)):
        return _by_kernel(rows_RD, row_ids_N, ends_T)
    return _by_torch(rows_RD, row_ids_N, ends_T)


def _by_kernel(rows_RD: Tensor, row_ids_N: Tensor, ends_T: Tensor) -> Tensor:
    from moetrain.kernels.combine import combine

    return combine(rows_RD, row_ids_N, ends_T)


def _by_torch(rows_RD: Tensor, row_ids_N: Tensor, ends_T: Tensor) -> Tensor:
    starts = torch.cat([ends_T.new_zeros(1), ends_T])
    return F.embedding_bag(row_ids_N, rows_RD, starts, mode="sum", include_last_offset=True)


def _refusal(case: tuple[torch.dtype, int]) -> str | None:
    return None if case[0] in KERNEL_DTYPES else f"the kernel does not take {case[0]}"


def _failure(device: torch.device, case: tuple[torch.dtype, int]) -> str | None:
    """The kernel against torch's sums in fp64; tokens without rows, with one, and with many."""
    dtype, remainder = case
    width = (_SMALL if device.type == "cpu" else _SMALL_GPU) + remainder
    generator = torch.Generator().manual_seed(0)
    counts_T = torch.tensor([0, 1, 0, 17, 2, 1, 8, 0])
    ends_T, pairs = counts_T.cumsum(0), int(counts_T.sum())
    rows_RD = torch.randn(pairs + 3, width, generator=generator).to(dtype)
    ids_N = torch.randperm(pairs + 3, generator=generator)[:pairs]
    ours_TD = _by_kernel(*(t.to(device) for t in (rows_RD, ids_N, ends_T)))
    return self_test.off("sum", ours_TD, _by_torch(rows_RD.double(), ids_N, ends_T), dtype)


_STEP = Step("the sum of a token's rows", _refusal, _failure)


@_gather_sum.register_fake
def _(rows_RD: Tensor, row_ids_N: Tensor, ends_T: Tensor, token_ids_R: Tensor, backend: str = AUTO) -> Tensor:
    return rows_RD.new_empty(ends_T.shape[0], rows_RD.shape[1])


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[3])
    ctx.padding = inputs[3].shape[0] - inputs[1].shape[0]  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    (token_ids_R,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return _spread(dy_TD, token_ids_R, ctx.padding), None, None, None, None  # type: ignore[attr-defined]


def _spread(dy_TD: Tensor, token_ids_R: Tensor, padding: int | torch.SymInt) -> Tensor:
    """:func:`gather_rows`, where the number of padding rows is known: only they are written twice."""
    if dy_TD.shape[0] == 0 or not isinstance(padding, int):  # a number that a traced layer does not know
        return gather_rows(dy_TD, token_ids_R)
    if not padding:
        return dy_TD.index_select(0, token_ids_R)
    unused_n = torch.nonzero_static(token_ids_R < 0, size=padding, fill_value=_NO_ROW).squeeze(1)
    return dy_TD.index_select(0, token_ids_R.clamp(min=0)).index_fill_(0, unused_n, 0)


_gather_sum.register_autograd(_backward, setup_context=_setup)


def gather_sum(
    rows_RD: Tensor, row_ids_N: Tensor, ends_T: Tensor, token_ids_R: Tensor, backend: str = AUTO
) -> Tensor:
    """``y[t] = sum of rows[row_ids[j]] for j in [ends[t - 1], ends[t])``, accumulated in fp32 at least.

    ``token_ids_R`` is the inverse map that backward needs: the token that each row goes to, -1 for padding.
    ``backend``: ``experts.backend``, which says whether ``kernels/combine.py`` may compute it.
    """
    return _gather_sum(rows_RD, row_ids_N, ends_T, token_ids_R, backend)  # type: ignore[no-any-return]


def gather_rows(source_XD: Tensor, ids_R: Tensor) -> Tensor:
    """``source[ids]``, zero where an id is -1.

    Without source rows too it has an edge back to the source: collectives of the backward pass hang on it.
    """
    if source_XD.shape[0] == 0:
        return source_XD.sum(0, keepdim=True).repeat(ids_R.shape[0], 1)
    rows_RD = source_XD.index_select(0, ids_R.clamp(min=0))
    return rows_RD.masked_fill_((ids_R < 0)[:, None], 0)
