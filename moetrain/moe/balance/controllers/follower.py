"""BlockFFN's coefficient, which follows its own loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moetrain.bounds import at_least
from moetrain.moe.balance.controllers.base import Controller, Terms, register_controller
from moetrain.moe.routers import Router

_LOSS = "chunk_sparsity"


@dataclass(frozen=True)
class FollowerOptions:
    max_factor: float = field(default=4.0, metadata=at_least(1))
    min_factor: float = field(default=1.025, metadata=at_least(1))  # of a coefficient that goes up, at once


class LossFollower(Controller):
    """BlockFFN's coefficient of ``chunk_sparsity``: it rises and falls with the loss.

    For the first ``hold`` steps the coefficient's factor is 1. Then, after each ``every`` steps, its goal is
    the factor times the ratio of the loss's mean over these steps to its mean over the ``every`` before; a
    ratio above 1 is at least ``min_factor``, and the goal at most ``max_factor``. Over the next ``every``
    steps the factor moves to the goal in equal parts (Song et al. 2025, and the released scheduler).

    The state is the number of steps, and in fp64 the factor, its goal, the last mean and the sum of the mean
    to come.
    """

    def __init__(
        self,
        name: str,
        layers: Iterable[int],
        max_factor: float,
        min_factor: float = 1.025,
        hold: int = 1000,
        every: int = 100,
    ) -> None:
        self.name, self.layers = name, tuple(layers)
        self.max_factor, self.min_factor = max_factor, min_factor
        self.hold, self.every = hold, every
        self.step = torch.zeros((), dtype=torch.int64)
        self.factor = torch.ones((), dtype=torch.float64)
        self.goal = torch.ones_like(self.factor)
        self.mean, self.sum = torch.zeros_like(self.factor), torch.zeros_like(self.factor)

    def update(self, demand: Mapping[int, Tensor], num_tokens: float, losses: Mapping[str, Tensor]) -> None:
        if self.name not in losses:  # as in a proof of another loss alone
            return
        self.step += 1
        self.sum += losses[self.name].double().sum()
        if not int(self.step) % self.every:
            self._aim()
        self.factor += (self.goal - self.factor) / (self.every - int(self.step) % self.every)

    def _aim(self) -> None:
        new, old = float(self.sum) / self.every, float(self.mean)
        if int(self.step) >= self.hold and new > 0 and old > 0:  # a loss of 0 has no ratio to follow
            ratio = new / old
            ratio = max(ratio, self.min_factor) if ratio > 1 else ratio
            self.goal.copy_(self.factor).mul_(ratio).clamp_(max=self.max_factor)
        self.mean.fill_(new)
        self.sum.zero_()

    def tensors(self) -> dict[str, Tensor]:
        names = ("step", "factor", "goal", "mean", "sum")
        return {f"{self.name}_{name}": getattr(self, name) for name in names}

    def factors(self) -> dict[str, dict[int, float]]:
        return {self.name: dict.fromkeys(self.layers, float(self.factor))}

    def metrics(self) -> dict[str, float]:
        return {f"{self.name}_factor": float(self.factor)}


def _check(options: FollowerOptions, terms: Terms) -> None:
    if _LOSS not in (names := [term.name for term in terms]):
        raise ValueError(
            f"max_factor={options.max_factor} is not used by balance.losses={names}: leave the controller "
            f"out, or add {_LOSS} to them"
        )


@register_controller(
    _LOSS,
    FollowerOptions,
    check=_check,
    what="BlockFFN's: from step 1000 on the coefficient of `chunk_sparsity` moves with that loss, over 100 "
    "steps by the ratio of its last two means, up to `max_factor` times",
)
def _build(options: FollowerOptions, routers: Mapping[int, Router]) -> Controller:
    return LossFollower(_LOSS, routers, options.max_factor, options.min_factor)
