"""Reading a source's feed-forward networks by layer: weights, or one key of the optimizer's state.

Shapes: S networks of a layer, D model, C columns a hidden unit (2 where gated, else 1), F hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.errors import UserError
from moetrain.upcycle.draw import wide
from moetrain.upcycle.names import EXPERTS, OPTIM, dense_names, prefix
from moetrain.upcycle.networks import DenseLayer, Networks

State = Mapping[str, Tensor]
STEP = "step"


@dataclass(frozen=True)
class Source:
    """One model, or several of one shape. ``reads_moe``: whether the layers to read are MoE."""

    states: Sequence[State]
    reads_moe: bool
    gated: bool

    @property
    def names(self) -> tuple[str, ...]:
        return EXPERTS if self.reads_moe else dense_names(self.gated)

    def networks(self, layer: int, key: str | None = None) -> Networks:
        """The layer's weights, or with ``key`` that state of theirs. UserError for a wrong shape."""
        names = [optim_name(prefix(layer) + name, key) for name in self.names]
        if not self.reads_moe:
            matrices = [[state[name] for name in names] for state in self.states]
            return Networks.of([DenseLayer(tuple(ups), down) for *ups, down in matrices])
        found = Networks(*(self.states[0][name] for name in names))
        if found.columns != (2 if self.gated else 1):
            kind = "a gated activation" if self.gated else "a plain activation"
            raise UserError(
                f"{names[0]} has {found.columns} columns a hidden unit, but {kind} wants "
                f"{2 if self.gated else 1}: set experts.activation to the source's"
            )
        return found

    def keys(self, parameter: str) -> list[str]:
        """Which optimizer state the first model holds of a parameter."""
        start = optim_name(parameter, "")
        return sorted(
            name.removeprefix(start)
            for name in self.states[0]
            if name.startswith(start) and "." not in name.removeprefix(start)
        )

    def one(self, name: str) -> Tensor:
        """A tensor on which all models must agree, as a number of steps. UserError where they do not."""
        first = self.states[0][name]
        for number, state in enumerate(self.states[1:], start=1):
            if not torch.equal(state[name], first):
                raise UserError(
                    f"{name} is {first.tolist()} in the first model and {state[name].tolist()} in donor "
                    f"{number}: set method.carry_optimizer=false"
                )
        return first

    def mean(self, name: str) -> Tensor:
        """Over the models, in their dtype; the first's own where there is one. UserError for other shapes."""
        first = self.states[0][name]
        if len(self.states) == 1 or not first.is_floating_point():
            return first
        if name.startswith(OPTIM) and name.endswith("." + STEP):
            return self.one(name)
        total = first.to(wide(first.dtype), copy=True)
        for number, state in enumerate(self.states[1:], start=1):
            if state[name].shape != first.shape:
                raise UserError(
                    f"donors of different shapes: {name} is {list(first.shape)} in the first model and "
                    f"{list(state[name].shape)} in donor {number}"
                )
            total += state[name]
        return (total / len(self.states)).to(first.dtype)


def optim_name(parameter: str, key: str | None) -> str:
    return parameter if key is None else f"{OPTIM}{parameter}.{key}"


def check_donors(states: Sequence[State], carry_optimizer: bool) -> None:
    """UserError unless all models have tensors of the same names."""

    def of(state: Iterable[str]) -> set[str]:
        return {name for name in state if carry_optimizer or not name.startswith(OPTIM)}

    first = of(states[0])
    for number, state in enumerate(states[1:], start=1):
        if different := sorted(first ^ of(state)):
            raise UserError(
                f"donor {number} and the first model differ in {len(different)} names, as {different[0]}"
            )
