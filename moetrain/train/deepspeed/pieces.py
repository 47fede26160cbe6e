"""What stages 1, 2 and 3 have in common: a rank updates pieces of the weights, laid end to end.

ZeRO flattens weights and cuts them at any element. A rank keeps the pieces of one parameter group in one
vector, and of the optimizer's state in others of the same length.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.checkpoint.state_dict import MODEL, OPTIM, ensure_state, model_tensors
from moetrain.errors import UserError
from moetrain.parallel.clip import all_reduce_total_, combined, local_total
from moetrain.train.deepspeed.engine import DeepSpeedEngine

_STEP = "step"  # the one state of an optimizer that is a number, the same for a whole group


@dataclass(frozen=True)
class Piece:
    """``numel`` elements from ``start`` of a flattened parameter lie at ``place`` of this rank's vector."""

    group: int
    start: int
    place: int
    numel: int

    def of(self, flat: Tensor) -> Tensor:
        """The piece in a vector of its group."""
        return flat.narrow(0, self.place, self.numel)

    def cut(self, tensor: Tensor) -> Tensor:
        """The piece of a tensor of the parameter's shape."""
        return tensor.reshape(-1).narrow(0, self.start, self.numel)


class OfPieces(DeepSpeedEngine):
    """A rank holds its pieces of the optimizer's state, and after a step's backward passes of the gradients.

    What DeepSpeed keeps of it, it keeps in fp32.
    """

    _group_of: dict[nn.Parameter, int]  # of all that is trained
    _pieces: dict[nn.Parameter, Piece]  # of what this rank holds some elements of

    @abstractmethod
    def _parts(self) -> dict[nn.Parameter, Tensor]:
        """Parameter -> this rank's piece of its gradient, live."""

    @abstractmethod
    def _vector(self, group: int) -> Tensor:
        """This rank's pieces of a group's weights, end to end, as the optimizer updates them."""

    @abstractmethod
    def _options(self, group: int) -> dict[str, Any]:
        """The optimizer's parameter group behind a group."""

    @abstractmethod
    def _put_together(self, parameter: nn.Parameter, part: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The ranks' pieces of a tensor of ``parameter``'s shape, on every rank that holds it."""

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        """Of what :meth:`_put_together` returns."""
        return parameter.shape

    def norm(self, norm_type: float = 2.0) -> Tensor:
        total = local_total(self._parts().values(), norm_type, self._trained[0].device)
        all_reduce_total_(total, norm_type, None)  # no two ranks hold the same piece
        return combined([total], norm_type)

    def gradients(self) -> dict[str, Tensor | None]:
        parts = self._parts()
        return {name: parts.get(parameter) for name, parameter in self.task.named_parameters()}

    def placed_gradients(self) -> Iterator[tuple[str, Tensor]]:
        parts = self._parts()
        for name, parameter in self.task.named_parameters():
            if parameter.requires_grad:
                local = self._put_together(parameter, parts.get(parameter), parameter.dtype)
            else:
                local = torch.zeros(self._shape(parameter), dtype=parameter.dtype, device=parameter.device)
            yield name, self.layout.as_whole(parameter, local)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Copies, cut by rows: what DeepSpeed keeps has no shape that a checkpoint could name."""
        found = {}
        for name, parameter in self._named():
            for key, value in self._state(self._group_of[parameter]).items():
                if key == _STEP:
                    found[f"{OPTIM}{name}.{key}"] = value.clone()
                    continue
                piece = self._pieces.get(parameter)
                part = None if piece is None else piece.of(value)
                local = self._put_together(parameter, part, value.dtype)
                found[f"{OPTIM}{name}.{key}"] = self.layout.share(parameter, local)
        return found

    @contextmanager
    def editing(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Afterwards DeepSpeed's own copies are as ``parameters`` are: it updates from these."""
        parameters = list(parameters)
        yield
        for parameter in parameters:
            if (piece := self._pieces.get(parameter)) is not None:
                piece.of(self._vector(piece.group).detach()).copy_(piece.cut(parameter.detach()))

    def _take_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Cut the state among ``tensors`` into the ranks' pieces.

        Raises UserError where parameters of one group made different numbers of steps: ZeRO keeps one.
        """
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
                local = self.layout.unshared(parameter, given)
                if (piece := self._pieces.get(parameter)) is not None:
                    piece.of(value).copy_(piece.cut(local))

    def _held(self) -> list[Tensor]:
        return list(self._parts().values())

    def _state(self, group: int) -> dict[str, Tensor]:
        """The state of this rank's pieces of a group."""
        flat = self._vector(group)
        ensure_state(self.optimizer, self._options(group), flat)
        state: dict[str, Tensor] = self.optimizer.state[flat]
        return state

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, tensor in model_tensors(self.task.model).items():
            if isinstance(tensor, nn.Parameter) and tensor in self._group_of:
                yield name.removeprefix(MODEL), tensor


def _steps_differ(one: str, steps: float, other: str, others: float) -> str:
    return (
        f"the optimizer's state has made {steps:g} steps for {one} and {others:g} for {other}, but ZeRO "
        "keeps one number for both: set engine.zero_stage=0 or engine=native, or leave init_optimizer out"
    )
