"""Stage 3: each rank holds a piece of every weight, and of its gradient and state.

A flattened weight is cut into as many pieces as there are ranks, of one size; the last ones are padded. Whole
weights are there only while DeepSpeed gathers them for the modules that run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor, nn
from torch.optim import Optimizer

from moetrain.checkpoint.state_dict import model_tensors
from moetrain.parallel.watchdog.flight_recorder import watched
from moetrain.train.deepspeed.gathering import outside_blocks, watch
from moetrain.train.deepspeed.layout import Layout
from moetrain.train.deepspeed.pieces import OfPieces, Piece
from moetrain.train.task import Task

_HOLDER = -1  # stands among the numbers of modules that use a parameter, and keeps it whole


class Sharded(OfPieces):
    """A piece of every weight."""

    def __init__(self, task: Task, runtime: Any, optimizer: Optimizer, layout: Layout) -> None:
        super().__init__(task, runtime, optimizer, layout)
        self._zero = runtime.optimizer
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._outside = outside_blocks(task)
        self._group_of = {p: index for index, of in enumerate(self._zero.fp16_groups) for p in of}
        self._pieces = {p: piece for p, group in self._group_of.items() if (piece := self._piece(p, group))}
        watch(self._zero, task)

    def weights(self) -> dict[str, Tensor]:
        return {name: self._shard(parameter) for name, parameter in self.task.named_parameters()}

    def drop_gradients(self) -> None:
        zero = self._zero
        zero.zero_grad()
        zero.averaged_gradients = {}
        if zero.offload_optimizer:
            zero.reset_cpu_buffers()

    def model_tensors(self) -> dict[str, Tensor]:
        """Weights are copies, cut by rows, as the optimizer's state is."""
        found = {}
        for name, tensor in model_tensors(self.task.model).items():
            if isinstance(tensor, nn.Parameter):
                local = self._put_together(tensor, self._shard(tensor), tensor.dtype)
                found[name] = self.layout.share(tensor, local)
            else:
                found[name] = tensor
        return found

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Weights and state are cut into the ranks' pieces."""
        self._free()
        for name, parameter in model_tensors(self.task.model).items():
            if not isinstance(parameter, nn.Parameter):
                continue
            local, shard = self.layout.unshared(parameter, tensors[name]).reshape(-1), self._shard(parameter)
            if shard.numel():
                shard.copy_(local.narrow(0, self._start(parameter), shard.numel()))
                self._to_vector(parameter)
        self._take_state(tensors)

    @contextmanager
    def editing(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        parameters = list(parameters)
        with (
            watched("the weights that routers change", "all_gather"),
            GatheredParameters(parameters, modifier_rank=0),
        ):
            yield
        for parameter in parameters:
            self._to_vector(parameter)

    @contextmanager
    def forward_only(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._free()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        with self.forward_only():
            with watched("DeepSpeed's weights", "all_gather"):
                self._outside[0].all_gather(self._outside)  # type: ignore[attr-defined]
            for parameter in self._outside:
                parameter.ds_active_sub_modules.add(_HOLDER)  # type: ignore[attr-defined]
            yield

    def _loss(self, loss: Tensor) -> Tensor:
        """DeepSpeed averages here, whatever it is told: of so many times the gradients that is their sum.

        What a rank's tokens miss has gradients of zeros already.
        """
        return loss * self._ranks

    def _parts(self) -> dict[nn.Parameter, Tensor]:
        zero = self._zero
        if zero.offload_optimizer:
            return {p: piece.of(self._vector(piece.group).grad) for p, piece in self._pieces.items()}  # type: ignore[arg-type]
        found = dict[nn.Parameter, Tensor]()
        for group, parameters in enumerate(zero.fp16_groups):
            padded = zero.averaged_gradients.get(group) or []
            found |= dict(zip(parameters, padded, strict=False))
        return {p: found[p].narrow(0, 0, piece.numel) for p, piece in self._pieces.items() if p in found}

    def _vector(self, group: int) -> Tensor:
        vector: Tensor = self._zero.fp32_partitioned_groups_flat[group]
        return vector

    def _options(self, group: int) -> dict[str, Any]:
        number: int = self._zero.sub_group_to_group_id[group]
        return self.optimizer.param_groups[number]

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        shape: torch.Size = parameter.ds_shape  # type: ignore[attr-defined]
        return shape

    def _put_together(self, parameter: nn.Parameter, part: Tensor | None, dtype: torch.dtype) -> Tensor:
        device = parameter.device if part is None else part.device
        padded = torch.zeros(self._size(parameter), dtype=dtype, device=device)
        if part is not None:
            padded.narrow(0, 0, part.numel()).copy_(part.detach())
        full = torch.empty(self._ranks * padded.numel(), dtype=dtype, device=device)
        with watched("a tensor's pieces", "all_gather"):
            dist.all_gather_into_tensor(full, padded)
        return full.narrow(0, 0, parameter.ds_numel).view(self._shape(parameter))  # type: ignore[attr-defined]

    def _free(self) -> None:
        """Free all weights that are whole."""
        self._zero.parameter_offload.partition_all_parameters()

    def _to_vector(self, parameter: nn.Parameter) -> None:
        """The optimizer goes on from the weight's shard."""
        if (piece := self._pieces.get(parameter)) is not None:
            piece.of(self._vector(piece.group).detach()).copy_(self._shard(parameter))

    def _size(self, parameter: nn.Parameter) -> int:
        """Elements of a shard, with its padding."""
        size: int = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        return size

    def _start(self, parameter: nn.Parameter) -> int:
        return self._rank * self._size(parameter)

    def _shard(self, parameter: nn.Parameter) -> Tensor:
        """This rank's elements of ``parameter``, flat and live, without padding."""
        left = parameter.ds_numel - self._start(parameter)  # type: ignore[attr-defined]
        shard: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        return shard.narrow(0, 0, max(0, min(shard.numel(), left)))

    def _piece(self, parameter: nn.Parameter, group: int) -> Piece | None:
        _, place, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        numel = self._shard(parameter).numel()
        return Piece(group, self._start(parameter), place, numel) if numel else None
