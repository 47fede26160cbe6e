"""The feed-forward networks of one layer, as upcycling reads and writes them.

Shapes: S networks, D model, F hidden, C columns a hidden unit (2 where gated: gate, up; else 1), M = C + 1
matrices (gate where there is one, up, down).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.errors import UserError
from moetrain.upcycle.names import dense_names


@dataclass(frozen=True)
class DenseLayer:
    """One dense feed-forward network, as its linear maps store it: [F, D] each, and the last [D, F]."""

    ups: tuple[Tensor, ...]
    w_down_DF: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of ``names.dense_names``."""
        return (*self.ups, self.w_down_DF)


@dataclass(frozen=True)
class Networks:
    """S networks of one width, as stacked experts store them."""

    w_gate_up_SDCF: Tensor
    w_down_SFD: Tensor

    @staticmethod
    def of(layers: Sequence[DenseLayer]) -> Networks:
        """Networks of one shape side by side. UserError for two shapes."""
        first = layers[0]
        for number, layer in enumerate(layers[1:], start=1):
            names = dense_names(len(first.ups) == 2)
            for name, ours, theirs in zip(names, first.tensors, layer.tensors, strict=True):
                if ours.shape != theirs.shape:
                    raise UserError(
                        f"donors of different shapes: {name} is {list(ours.shape)} in the first model and "
                        f"{list(theirs.shape)} in donor {number}"
                    )
        shape = (len(layers), *first.w_down_DF.shape[:1], len(first.ups), *first.w_down_DF.shape[1:])
        ups = first.w_down_DF.new_empty(shape)
        for network, layer in zip(ups, layers, strict=True):
            for column, up_FD in enumerate(layer.ups):
                network[:, column].copy_(up_FD.t())
        return Networks(ups, torch.stack([layer.w_down_DF.t() for layer in layers]))

    @property
    def d_ff(self) -> int:
        return self.w_down_SFD.shape[1]

    @property
    def count(self) -> int:
        return self.w_down_SFD.shape[0]

    @property
    def columns(self) -> int:
        return self.w_gate_up_SDCF.shape[2]

    def matrices(self) -> list[Tensor]:
        """Views [S, F, D] of gate (where there is one), up and down: one row a hidden unit."""
        return [*self.w_gate_up_SDCF.permute(2, 0, 3, 1), self.w_down_SFD]
