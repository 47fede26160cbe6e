"""Values in fp64 with a bound of the error that a kernel may make: running error analysis, to first order.

Shapes are free. A kernel sums in fp32 and rounds what it stores; each function below says what it adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

U32 = 2.0**-24  # unit roundoff of fp32
# A tensor core may truncate where fp32 rounds: an addition then errs by twice as much.
_ADDITION = 2 * U32
_EXPONENTIAL = 8 * U32  # of a sigmoid's relative error, times one and its argument: approximate exp2
UNIT = {torch.float32: U32, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}


@dataclass(frozen=True)
class Bounded:
    """``value`` in fp64, from which a kernel's differs by ``error`` at most, element by element."""

    value: Tensor
    error: Tensor

    @staticmethod
    def exact(x: Tensor) -> Bounded:
        """An operand as the kernel reads it."""
        return Bounded(x.double(), torch.zeros_like(x, dtype=torch.float64))

    @property
    def most(self) -> Tensor:
        """The largest absolute value that the kernel may have."""
        return self.value.abs() + self.error

    @property
    def t(self) -> Bounded:
        return Bounded(self.value.mT, self.error.mT)

    def __getitem__(self, at: slice | Tensor) -> Bounded:
        return Bounded(self.value[at], self.error[at])

    def __matmul__(self, other: Bounded) -> Bounded:
        """A sum of K products in fp32, in any order."""
        most = self.most @ other.most
        spread = most - self.value.abs() @ other.value.abs()
        return Bounded(
            self.value @ other.value, spread.clamp(min=0) + (self.value.shape[-1] + 1) * _ADDITION * most
        )

    def __mul__(self, other: Bounded) -> Bounded:
        most = self.most * other.most
        spread = most - (self.value * other.value).abs()
        return Bounded(self.value * other.value, spread.clamp(min=0) + U32 * most)

    def __add__(self, other: Bounded) -> Bounded:
        value, error = self.value + other.value, self.error + other.error
        return Bounded(value, error + U32 * (value.abs() + error))

    def sum(self, dim: int) -> Bounded:
        """A sum of n elements in fp32, in any order."""
        most = self.most.sum(dim)
        return Bounded(self.value.sum(dim), self.error.sum(dim) + self.value.shape[dim] * _ADDITION * most)

    def rounded(self, dtype: torch.dtype) -> Bounded:
        """Stored in ``dtype``."""
        return Bounded(self.value, self.error + UNIT[dtype] * self.most + _SMALLEST[dtype])

    def sigmoid(self) -> Bounded:
        value = self.value.sigmoid()
        return Bounded(value, self.error / 4 + _EXPONENTIAL * (1 + self.value.abs()) * value)

    def ratio(self, found: Tensor) -> float:
        """The largest error of ``found`` in units of the bound; infinite for what is not a number."""
        if not found.numel():
            return 0.0
        off = (found.double() - self.value).abs()
        ratio = torch.where(off == 0, 0, off / self.error.clamp(min=1e-300))
        return float(ratio.nan_to_num(nan=torch.inf).max())


def silu(gate: Bounded) -> Bounded:
    """gate * sigmoid(gate)."""
    return gate * gate.sigmoid()


def silu_slope(gate: Bounded) -> Bounded:
    """The derivative: s (1 + gate (1 - s)) of s = sigmoid(gate)."""
    s = gate.sigmoid()
    rest = Bounded(1 - s.value, s.error + U32)
    return s * (Bounded.exact(torch.ones_like(s.value)) + gate * rest)
