"""What is added to a matrix that stays: a product of two narrow ones (LoRA; Hu et al. 2021,
arXiv:2106.09685).

Shapes: N rows and K columns of the matrix, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moetrain.ops.init import Constant, Normal, parameter


@dataclass(frozen=True)
class LoRA:
    """``alpha / rank`` multiplies the product."""

    rank: int
    alpha: float


class LowRank(nn.Module):
    """``W + alpha / rank b a``, formed anew in each forward pass; ``b`` starts at zero, and W is as it was.

    ``a`` starts with the variance of torch's own linear layers, 1 / (3 K), as in the authors' code (normal
    here, uniform there).
    """

    keeps_own_init = True  # whatever the model around it says of initial values

    def __init__(self, rows: int, columns: int, lora: LoRA) -> None:
        super().__init__()
        self.factor = lora.alpha / lora.rank
        self.a_RK = parameter((lora.rank, columns), Normal((3 * columns) ** -0.5))
        self.b_NR = parameter((rows, lora.rank), Constant(0.0))

    def forward(self, weight_NK: Tensor) -> Tensor:
        """The matrix that takes the place of ``weight_NK``, in its dtype."""
        return torch.addmm(weight_NK, self.b_NR, self.a_RK, alpha=self.factor)


def low_rank(rows: int, columns: int, lora: LoRA | None) -> LowRank | None:
    return None if lora is None else LowRank(rows, columns, lora)


def adapted(weight_NK: Tensor, added: nn.Module | None) -> Tensor:
    """``weight_NK``, or what ``added`` makes of it."""
    if added is None:
        return weight_NK
    changed: Tensor = added(weight_NK)
    return changed
