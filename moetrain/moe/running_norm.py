"""Batch norm whose statistics are those of earlier steps, in training as in evaluation.

Batch norm by the batch's own statistics would let a token see later ones, and would need the tokens of other
ranks and micro-batches first. Here a step reads what the steps before it left behind, and its own sums move
them once, after the update, whatever the layout. Gradients treat the statistics as constants.

Shapes: n rows, X normalised features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class RunningNorm(nn.Module):
    """(z - mean) / sqrt(variance + eps), without a gain.

    The statistics move by ``momentum`` a step; the first steps average evenly until that is more, so that the
    zero mean and unit variance of the start are forgotten at once. They are fp64 and part of checkpoints.
    """

    mean_X: Tensor
    variance_X: Tensor
    steps: Tensor

    def __init__(self, features: int, momentum: float, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean_X", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("variance_X", torch.ones(features, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor) -> Tensor:
        """``z`` [..., X], in its own dtype."""
        scale_X = (self.variance_X + self.eps).rsqrt()
        return (z - self.mean_X.to(z.dtype)) * scale_X.to(z.dtype)

    @torch.no_grad()
    def sums(self, z_nX: Tensor, weights_n: Tensor | None) -> Tensor:
        """[1 + 2 X] fp64: rows, sums and squares; rows of weight 0 (padding) count for nothing."""
        z_nX = z_nX.double()
        if weights_n is None:
            weights_n = torch.ones(len(z_nX), dtype=torch.float64, device=z_nX.device)
        weights_n = weights_n.double()
        return torch.cat([weights_n.sum()[None], weights_n @ z_nX, weights_n @ z_nX.square()])

    @torch.no_grad()
    def move(self, sums: Tensor) -> None:
        """Take in the sums of one step, over all its tokens. The variance is that of the tokens (biased)."""
        sums = sums.to(self.mean_X)
        rows, (sum_X, square_X) = sums[0].clamp(min=1), sums[1:].chunk(2)
        mean_X = sum_X / rows
        variance_X = (square_X / rows - mean_X.square()).clamp(min=0)
        moved = sums[0] > 0  # a step without a row is none
        self.steps += moved
        share = (1 / self.steps.double().clamp(min=1)).clamp(min=self.momentum) * moved
        self.mean_X.lerp_(mean_X, share)
        self.variance_X.lerp_(variance_X, share)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningNorm:
        """Buffers keep fp64 through every cast of the model."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = (
                    torch.zeros_like(after, dtype=before.dtype) if before.is_meta else before.to(after.device)
                )
        return self
