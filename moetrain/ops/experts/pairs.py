"""Low-rank products beside an expert's matrix, one expert at a time: forward and backward.

Shapes: n rows of one expert, K and N inner and outer width of the matrix, L rank.
"""

from __future__ import annotations

from torch import Tensor

from moetrain.ops.cpu.product import outer, product
from moetrain.ops.experts.operands import Pair


def add_product(y_nN: Tensor, x_nK: Tensor, pair: Pair | None, expert: int) -> None:
    """``y += x a b``, in place."""
    if pair is not None:
        a_KL, b_LN = (w[expert].to(x_nK.dtype) for w in (pair.a_EKL, pair.b_ELN))
        y_nN.addmm_(product(x_nK, a_KL), b_LN)


def add_backward(dx_nK: Tensor, x_nK: Tensor, dy_nN: Tensor, pair: Pair | None, expert: int) -> None:
    """Add to ``dx`` what comes through the product, and fill the expert's gradients of its factors."""
    if pair is not None:
        dnarrow_nL = narrow_backward(dy_nN, pair, expert)
        dx_nK.addmm_(dnarrow_nL, pair.a_EKL[expert].to(dx_nK.dtype).t())
        fill_gradients(x_nK, dnarrow_nL, dy_nN, pair, expert)


def narrow_backward(dy_nN: Tensor, pair: Pair, expert: int) -> Tensor:
    """d loss / d (x a), [n, L]."""
    return product(dy_nN, pair.b_ELN[expert].to(dy_nN.dtype).t())


def fill_gradients(x_nK: Tensor, dnarrow_nL: Tensor, dy_nN: Tensor, pair: Pair, expert: int) -> None:
    """Of both factors of one expert."""
    da_EKL, db_ELN = pair.gradients
    outer(x_nK, dnarrow_nL, da_EKL[expert])
    outer(product(x_nK, pair.a_EKL[expert].to(x_nK.dtype)), dy_nN, db_ELN[expert])
