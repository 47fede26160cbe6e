"""Stages 1 and 2: each rank updates a contiguous piece of all weights laid end to end.

ZeRO flattens each parameter group into one vector and cuts it into as many equal pieces as ranks hold those
weights. A piece begins and ends inside parameters; where, DeepSpeed keeps at each parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from moetrain.checkpoint.state_dict import MODEL, OPTIM, ensure_state, model_tensors
from moetrain.errors import UserError
from moetrain.ops.local_part import whole
from moetrain.parallel.clip import all_reduce_total_, combined, local_total
from moetrain.parallel.watchdog.flight_recorder import watched
from moetrain.train.deepspeed.engine import DeepSpeedEngine
from moetrain.train.deepspeed.layout import Layout
from moetrain.train.task import Task

_STEP = "step"  # the one state of an optimizer that is a number, the same for a whole group


@dataclass(frozen=True)
class _Piece:
    """``numel`` elements from ``start`` of a flattened parameter lie at ``place`` of this rank's vector."""

    group: int
    start: int
    place: int
    numel: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.place, self.numel)


class Partitioned(DeepSpeedEngine):
    """A rank holds its piece of the optimizer's state, and after a step's backward passes of the gradients.

    What DeepSpeed keeps of it, it keeps in fp32.
    """

    def __init__(self, task: Task, runtime: Any, optimizer: Optimizer, layout: Layout) -> None:
        super().__init__(task, runtime, optimizer, layout)
        self._zero = runtime.optimizer
        self._group_of = {p: index for index, of in enumerate(self._zero.bit16_groups) for p in of}
        self._pieces = {p: piece for p, group in self._group_of.items() if (piece := _piece(p, group))}

    def norm(self, norm_type: float = 2.0) -> Tensor:
        total = local_total(self._parts().values(), norm_type, self._trained[0].device)
        all_reduce_total_(total, norm_type, None)  # no two ranks hold the same piece
        return combined([total], norm_type)

    def gradients(self) -> dict[str, Tensor | None]:
        parts = self._parts()
        return {name: parts.get(parameter) for name, parameter in self.task.named_parameters()}

    def whole_gradients(self) -> Iterator[tuple[str, Tensor]]:
        parts = self._parts()
        for name, parameter in self.task.named_parameters():
            if parameter.requires_grad:
                local = self._put_together(parameter, parts.get(parameter), parameter.dtype)
            else:
                local = torch.zeros_like(parameter)
            yield name, whole(self.layout.as_whole(parameter, local))

    def drop_gradients(self) -> None:
        zero = self._zero
        zero.zero_grad()
        for group in list(zero.averaged_gradients):
            zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
        zero.micro_step_id = -1  # as DeepSpeed's own step leaves it

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Copies, cut by rows: what DeepSpeed keeps has no shape that a checkpoint could name."""
        found = {}
        for name, parameter in self._named():
            state = self._state(self._group_of[parameter])
            for key, value in state.items():
                if key == _STEP:
                    found[f"{OPTIM}{name}.{key}"] = value.clone()
                    continue
                piece = self._pieces.get(parameter)
                part = None if piece is None else piece.of(value)
                local = self._put_together(parameter, part, value.dtype)
                found[f"{OPTIM}{name}.{key}"] = self.layout.share(parameter, local)
        return found

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Weights become DeepSpeed's master weights; state is cut into the ranks' pieces.

        Raises UserError where parameters of one group made different numbers of steps: ZeRO keeps one.
        """
        self._zero.refresh_fp32_params()
        steps: dict[int, tuple[float, str]] = {}
        for name, parameter in self._named():
            group = self._group_of[parameter]
            for key, value in self._state(group).items():
                given = tensors.get(f"{OPTIM}{name}.{key}")
                if given is None:
                    continue
                if key == _STEP:
                    first, named = steps.setdefault(group, (float(given), name))
                    if float(given) != first:
                        raise UserError(_steps_differ(named, first, name, float(given)))
                    value.copy_(given)
                    continue
                local = self.layout.unshared(parameter, given).reshape(-1)
                if (piece := self._pieces.get(parameter)) is not None:
                    piece.of(value).copy_(local.narrow(0, piece.start, piece.numel))

    def _held(self) -> list[Tensor]:
        return list(self._parts().values())

    def _parts(self) -> dict[nn.Parameter, Tensor]:
        """Parameter -> this rank's piece of its gradient, live."""
        zero, found = self._zero, dict[nn.Parameter, Tensor]()
        if zero.cpu_offload:
            flats = [flat.grad for flat in zero.single_partition_of_fp32_groups]
            return {p: piece.of(flats[piece.group]) for p, piece in self._pieces.items()}
        for group, parameters in enumerate(zero.params_in_partition):
            parts = [g for g in zero.averaged_gradients.get(group) or [] if not hasattr(g, "_zero_padding")]
            found |= dict(zip(parameters, parts, strict=False))  # a rank without any has a vector of zeros
        return found

    def _state(self, group: int) -> dict[str, Tensor]:
        """The state of this rank's piece of a group."""
        flat = self._zero.single_partition_of_fp32_groups[group]
        ensure_state(self.optimizer, self.optimizer.param_groups[group], flat)
        state: dict[str, Tensor] = self.optimizer.state[flat]
        return state

    def _put_together(self, parameter: nn.Parameter, part: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The ranks' pieces of a tensor of ``parameter``'s shape, on every rank that holds it."""
        device = parameter.device if part is None else part.device
        full = torch.zeros(parameter.numel(), dtype=dtype, device=device)
        piece = self._pieces.get(parameter)
        if part is not None and piece is not None:
            full.narrow(0, piece.start, piece.numel).copy_(part.detach().reshape(-1))
        group = self.layout.alike(parameter)
        with watched("a tensor's pieces", group=group):
            dist.all_reduce(full, group=group)
        return full.view_as(parameter)

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, tensor in model_tensors(self.task.model).items():
            if isinstance(tensor, nn.Parameter) and tensor in self._group_of:
                yield name.removeprefix(MODEL), tensor


def _piece(parameter: nn.Parameter, group: int) -> _Piece | None:
    mapping: Any = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    inside, place = mapping.lp_fragment_address, mapping.hp_fragment_address
    return _Piece(group, inside.start, place.start, inside.numel)


def _steps_differ(one: str, steps: float, other: str, others: float) -> str:
    return (
        f"the optimizer's state has made {steps:g} steps for {one} and {others:g} for {other}, but ZeRO "
        "keeps one number for both: set engine.zero_stage=0 or engine=native, or leave init_optimizer out"
    )
