"""All that ``kernel_speed.py`` times and checks of one problem."""

from __future__ import annotations

import kernel_products
import kernel_rows
import kernel_sparse
from kernel_problem import Problem, Unit

WHOLE = (kernel_products.feed_forward, kernel_products.feed_forward_and_backward)
PARTS = (
    kernel_products.up_projection,
    kernel_products.down_projection,
    kernel_products.hidden,
    kernel_products.up_gradient,
    kernel_products.down_gradient,
    kernel_sparse.stored_products,
    kernel_sparse.kept_products,
    kernel_sparse.transposed_products,
    kernel_sparse.activation,
    kernel_sparse.activation_gradient,
    kernel_rows.sums,
    kernel_rows.rows_laid_out,
    kernel_rows.routed,
)


def units(p: Problem, parts: bool = True) -> list[Unit]:
    """The whole feed-forward, and, ``parts``, its kernels one by one and what surrounds it."""
    return [make(p) for make in (*WHOLE, *(PARTS if parts else ()))]
