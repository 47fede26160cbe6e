"""Products with rows that are looked up in a large table, and how a table's parameter is made.

No tensor of all looked-up rows is made: T A rows of width D would be A times the activations. Tokens go by
chunks, forward and backward, and the table's gradient is summed in fp32 at least.

Shapes: T tokens, A rows of a token, D width, N rows of the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moetrain.ops.init import Initializer, parameter

_CHUNK = 2**21  # elements of the rows that are looked up at once


def row_table(shape: Sequence[int], initializer: Initializer) -> nn.Parameter:
    """A parameter [N, D] whose rows are looked up: an optimizer may keep one number a row of it."""
    made = parameter(shape, initializer)
    made.is_row_table = True  # type: ignore[attr-defined]
    return made


def is_row_table(parameter: Tensor) -> bool:
    """Whether :func:`row_table` made it. Layouts and allocation keep the mark."""
    return getattr(parameter, "is_row_table", False) is True


def row_products(x_TD: Tensor, table_ND: Tensor, ids_TA: Tensor) -> Tensor:
    """[T, A]: the inner product of each token with its rows."""
    y_TA: Tensor = _RowProducts.apply(x_TD, table_ND, ids_TA)  # type: ignore[no-untyped-call]
    return y_TA


def row_sums(weights_TA: Tensor, table_ND: Tensor, ids_TA: Tensor) -> Tensor:
    """[T, D]: each token's rows, weighted and summed."""
    y_TD: Tensor = _RowSums.apply(weights_TA, table_ND, ids_TA)  # type: ignore[no-untyped-call]
    return y_TD


class _RowProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, table_ND: Tensor, ids_TA: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, table_ND, ids_TA)
        return _products(x_TD, table_ND, ids_TA)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TA: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TD, table_ND, ids_TA = ctx.saved_tensors
        for_x, for_table, _ = ctx.needs_input_grad
        return (
            _sums(dy_TA, table_ND, ids_TA) if for_x else None,
            _scattered(dy_TA, x_TD, table_ND, ids_TA) if for_table else None,
            None,
        )


class _RowSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_TA: Tensor, table_ND: Tensor, ids_TA: Tensor) -> Tensor:
        ctx.save_for_backward(weights_TA, table_ND, ids_TA)
        return _sums(weights_TA, table_ND, ids_TA)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weights_TA, table_ND, ids_TA = ctx.saved_tensors
        for_weights, for_table, _ = ctx.needs_input_grad
        return (
            _products(dy_TD, table_ND, ids_TA) if for_weights else None,
            _scattered(weights_TA, dy_TD, table_ND, ids_TA) if for_table else None,
            None,
        )


def _products(x_TD: Tensor, table_ND: Tensor, ids_TA: Tensor) -> Tensor:
    y_TA = x_TD.new_empty(ids_TA.shape)
    for chunk in _chunks(ids_TA, table_ND):
        y_TA[chunk] = torch.bmm(table_ND[ids_TA[chunk]], x_TD[chunk, :, None]).squeeze(-1)
    return y_TA


def _sums(weights_TA: Tensor, table_ND: Tensor, ids_TA: Tensor) -> Tensor:
    y_TD = weights_TA.new_empty(len(ids_TA), table_ND.shape[1])
    for chunk in _chunks(ids_TA, table_ND):
        y_TD[chunk] = torch.bmm(weights_TA[chunk, None], table_ND[ids_TA[chunk]]).squeeze(1)
    return y_TD


def _scattered(weights_TA: Tensor, x_TD: Tensor, table_ND: Tensor, ids_TA: Tensor) -> Tensor:
    """[N, D]: the sum of weight times x over all places where a row was looked up."""
    wide = torch.promote_types(table_ND.dtype, torch.float32)
    total_ND = torch.zeros_like(table_ND, dtype=wide)
    for chunk in _chunks(ids_TA, table_ND):
        rows_cAD = weights_TA[chunk, :, None].to(wide) * x_TD[chunk, None].to(wide)
        total_ND.index_add_(0, ids_TA[chunk].reshape(-1), rows_cAD.flatten(0, 1))
    return total_ND.to(table_ND.dtype)


def _chunks(ids_TA: Tensor, table_ND: Tensor) -> Iterator[slice]:
    tokens, rows = ids_TA.shape
    step = max(1, _CHUNK // max(1, rows * table_ND.shape[1]))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))
