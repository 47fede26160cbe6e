"""What is added to a matrix that stays: a product of two narrow ones (LoRA; Hu et al. 2021,
arXiv:2106.09685).

Beside a matrix the product has its own way from the input, ``x W' + factor (x a') b'``, so that the matrix is
read once and never rewritten. Where a module's own code multiplies by its matrix, the sum ``W + factor b a``
stands in the matrix's place while the module runs.

Shapes: N rows and K columns of a matrix, R rank, E experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.ops.init import Constant, Normal, parameter
from moetrain.ops.linear import linear, linears

PREFIX = "lora_"  # of the module that a matrix's product is, before the matrix's own name
_ZERO = Constant(0.0)
Draw = Callable[[tuple[int, int], int], Tensor]  # (T, K), salt -> uniform noise in (0, 1)


class LowRank(nn.Module):
    """``factor b a``, beside a matrix [N, K]; ``b`` starts at zero, and the matrix's function is as it was.

    ``a`` starts with the variance of torch's own linear layers, 1 / (3 K), as in the authors' code (normal
    here, uniform there). ``dropout``: the probability with which an element of the product's input is
    dropped in training, by the noise of ``draw`` and ``salt``.
    """

    keeps_own_init = True  # whatever the model around it says of initial values

    def __init__(
        self, rows: int, columns: int, rank: int, factor: float, dropout: float = 0.0, salt: int = 0
    ) -> None:
        super().__init__()
        self.factor, self.dropout, self.salt = factor, dropout, salt
        self.draw: Draw | None = None
        self.a_RK = parameter((rank, columns), _start(columns))
        self.b_NR = parameter((rows, rank), _ZERO)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]: what is added to the matrix's product of ``x``."""
        narrow = linear(self._dropped(x), self.a_RK)
        return linear(narrow, self.b_NR) * self.factor

    def sum(self, weight_NK: Tensor) -> Tensor:
        """The matrix with the product, in the matrix's dtype."""
        return torch.addmm(weight_NK, self.b_NR, self.a_RK, alpha=self.factor)

    def _dropped(self, x: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return x
        assert self.draw is not None  # the decoder gives it before each pass
        kept = self.draw((x.numel() // x.shape[-1], x.shape[-1]), self.salt) >= self.dropout
        return x * kept.view(x.shape).to(x.dtype) / (1 - self.dropout)


class StackedLowRank(nn.Module):
    """The same beside each of E stacked matrices, which are [K, N] here: ``x W_e + factor (x a_e) b_e``.

    ``inner``: the shape of the N columns, where they are more than one dimension.
    """

    keeps_own_init = True

    def __init__(
        self, num_experts: int, columns: int, inner: tuple[int, ...], rank: int, factor: float
    ) -> None:
        super().__init__()
        self.factor = factor
        self.a_EKR = parameter((num_experts, columns, rank), _start(columns))
        self.b_ERN = parameter((num_experts, rank, *inner), _ZERO)


def _start(columns: int) -> Normal:
    return Normal((3 * columns) ** -0.5)


def beside(owner: nn.Module, leaf: str) -> LowRank | None:
    """What is added to the matrix ``leaf`` of ``owner``; None: nothing."""
    return owner._modules.get(PREFIX + leaf)  # type: ignore[return-value]


def linear_beside(x: Tensor, owner: nn.Module, leaf: str, bias_N: Tensor | None = None) -> Tensor:
    """``x`` times the matrix ``leaf`` of ``owner``, its bias, and what is added."""
    return linears_beside(x, owner, [leaf], [bias_N])[0]


def linears_beside(
    x: Tensor, owner: nn.Module, leaves: Sequence[str], biases: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """:func:`linear_beside` of one input by several matrices."""
    products = linears(x, [getattr(owner, leaf) for leaf in leaves], biases)
    added = [beside(owner, leaf) for leaf in leaves]
    return [y if more is None else y + more(x) for y, more in zip(products, added, strict=True)]


def sum_while_running(owner: nn.Module, leaf: str, added: LowRank) -> None:
    """Let ``owner`` find its matrix ``leaf`` with the product while its forward runs."""
    kept: list[nn.Parameter] = []

    def put(*unused: Any) -> None:
        parameter = owner._parameters[leaf]
        assert parameter is not None
        kept.append(parameter)
        owner._parameters[leaf] = added.sum(parameter)  # type: ignore[assignment]  # the graph leads back

    def take(*unused: Any) -> None:
        owner._parameters[leaf] = kept.pop()

    owner.register_forward_pre_hook(put)
    owner.register_forward_hook(take, always_call=True)


def is_factor(name: str) -> bool:
    """Whether a parameter of a decoder is a factor of such a product."""
    return f".{PREFIX}" in name


def starts_at_zero(name: str) -> bool:
    """Whether it is the factor that does."""
    return is_factor(name) and name.rpartition(".")[2].startswith("b_")


def factor_start(name: str, shape: Sequence[int]) -> Normal | Constant:
    """How the factor ``name`` of that shape starts."""
    return _ZERO if starts_at_zero(name) else _start(shape[1])
