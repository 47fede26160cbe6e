"""A plug-in controller: ``plugins=[own_controller]``, ``balance.controllers.pressure.bound=1.5``.

Shapes: E experts of one layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moetrain.bounds import above
from moetrain.moe import Router
from moetrain.moe.balance import Controller, register_controller


@dataclass(frozen=True)
class PressureOptions:
    bound: float = field(default=1.5, metadata=above(1))


class Pressure(Controller):
    """A layer's coefficient of ``switch`` grows while its busiest expert is above ``bound`` mean loads."""

    def __init__(self, layers: Mapping[int, Router], bound: float) -> None:
        self.bound = bound
        self.factor = {layer: torch.ones((), dtype=torch.float64) for layer in layers}

    def update(self, demand: Mapping[int, Tensor], num_tokens: float, losses: Mapping[str, Tensor]) -> None:
        for layer, demand_E in demand.items():
            load_E = demand_E.double()
            self.factor[layer].mul_(1.25 if load_E.max() > self.bound * load_E.mean() else 0.9)

    def tensors(self) -> dict[str, Tensor]:
        return {f"pressure.{layer}": factor for layer, factor in self.factor.items()}

    def factors(self) -> dict[str, dict[int, float]]:
        return {"switch": {layer: float(factor) for layer, factor in self.factor.items()}}

    def metrics(self) -> dict[str, float]:
        return {f"pressure_{layer}": float(factor) for layer, factor in self.factor.items()}


@register_controller("pressure", PressureOptions)
def build(options: PressureOptions, routers: Mapping[int, Router]) -> Controller:
    return Pressure(routers, options.bound)
