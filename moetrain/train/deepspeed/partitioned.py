"""Stages 1 and 2: weights are whole on each rank, which updates a contiguous piece of all of them.

ZeRO flattens each parameter group into one vector and cuts it into as many equal pieces as ranks hold those
weights. A piece begins and ends inside parameters; where, DeepSpeed keeps at each parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from moetrain.parallel.watchdog.flight_recorder import watched
from moetrain.train.deepspeed.layout import Layout
from moetrain.train.deepspeed.pieces import OfPieces, Piece
from moetrain.train.task import Task


class Partitioned(OfPieces):
    """A piece of all weights laid end to end, experts' apart from the others."""

    def __init__(self, task: Task, runtime: Any, optimizer: Optimizer, layout: Layout) -> None:
        super().__init__(task, runtime, optimizer, layout)
        self._zero = runtime.optimizer
        self._group_of = {p: index for index, of in enumerate(self._zero.bit16_groups) for p in of}
        self._pieces = {p: piece for p, group in self._group_of.items() if (piece := _piece(p, group))}

    def drop_gradients(self) -> None:
        zero = self._zero
        zero.zero_grad()
        for group in list(zero.averaged_gradients):
            zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
        zero.micro_step_id = -1  # as DeepSpeed's own step leaves it

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Weights become DeepSpeed's master weights; state is cut into the ranks' pieces."""
        self._zero.refresh_fp32_params()
        self._take_state(tensors)

    def _parts(self) -> dict[nn.Parameter, Tensor]:
        zero, found = self._zero, dict[nn.Parameter, Tensor]()
        if zero.cpu_offload:
            flats = [flat.grad for flat in zero.single_partition_of_fp32_groups]
            return {p: piece.of(flats[piece.group]) for p, piece in self._pieces.items()}
        for group, parameters in enumerate(zero.params_in_partition):
            parts = [g for g in zero.averaged_gradients.get(group) or [] if not hasattr(g, "_zero_padding")]
            found |= dict(zip(parameters, parts, strict=False))  # a rank without any has a vector of zeros
        return found

    def _vector(self, group: int) -> Tensor:
        vector: Tensor = self._zero.single_partition_of_fp32_groups[group]
        return vector

    def _options(self, group: int) -> dict[str, Any]:
        return self.optimizer.param_groups[group]

    def _put_together(self, parameter: nn.Parameter, part: Tensor | None, dtype: torch.dtype) -> Tensor:
        device = parameter.device if part is None else part.device
        full = torch.zeros(parameter.numel(), dtype=dtype, device=device)
        piece = self._pieces.get(parameter)
        if part is not None and piece is not None:
            piece.cut(full).copy_(part.detach().reshape(-1))
        group = self.layout.alike(parameter)
        with watched("a tensor's pieces", group=group):
            dist.all_reduce(full, group=group)
        return full.view_as(parameter)


def _piece(parameter: nn.Parameter, group: int) -> Piece | None:
    mapping: Any = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    inside, place = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Piece(group, inside.start, place.start, inside.numel)
