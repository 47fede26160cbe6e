"""The feed-forward networks of one layer, as upcycling reads and writes them.

Shapes: S networks, D model, F hidden, P = 2F (gated: gate, then up) or F.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.errors import UserError


@dataclass(frozen=True)
class DenseLayer:
    """One dense feed-forward network, as its linear maps store it."""

    w_gate_up_PD: Tensor
    w_down_DF: Tensor


@dataclass(frozen=True)
class Networks:
    """S networks of one width, as stacked experts store them."""

    w_gate_up_SDP: Tensor
    w_down_SFD: Tensor

    @staticmethod
    def of(layers: Sequence[DenseLayer]) -> Networks:
        """Networks of one shape side by side; of a single one no copy is made. UserError for two shapes."""
        first = layers[0]
        for number, layer in enumerate(layers[1:], start=1):
            for name in ("w_gate_up_PD", "w_down_DF"):
                ours, theirs = list(getattr(first, name).shape), list(getattr(layer, name).shape)
                if ours != theirs:
                    raise UserError(
                        f"donors of different shapes: {name} is {ours} in the first model and {theirs} in "
                        f"donor {number}"
                    )
        if len(layers) == 1:
            return Networks(first.w_gate_up_PD.t()[None], first.w_down_DF.t()[None])
        return Networks(
            torch.stack([layer.w_gate_up_PD.t() for layer in layers]),
            torch.stack([layer.w_down_DF.t() for layer in layers]),
        )

    @property
    def d_ff(self) -> int:
        return self.w_down_SFD.shape[1]

    @property
    def count(self) -> int:
        return self.w_down_SFD.shape[0]

    def matrices(self, columns: int) -> list[Tensor]:
        """Views [S, F, D] of gate (where ``columns`` is 2), up and down: one row a hidden unit."""
        split = self.w_gate_up_SDP.unflatten(-1, (columns, -1))
        return [*split.permute(2, 0, 3, 1), self.w_down_SFD]
