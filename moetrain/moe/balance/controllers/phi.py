"""The population's mean routing distribution, for the loss ``phi``. Shapes: E experts of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moetrain.bounds import within
from moetrain.moe.balance.base import probabilities, without_scores
from moetrain.moe.balance.controllers.base import Controller, Terms, register_controller
from moetrain.moe.balance.phi import POPULATION
from moetrain.moe.routers import Router
from moetrain.moe.routing import RoutingRecord


@dataclass(frozen=True)
class PopulationOptions:
    rate: float = field(default=0.01, metadata=within(0, 1, open_low=True))


class PopulationLoad(Controller):
    """An exponential mean over steps of each layer's mean scores, normalised to sum 1: m += rate (P - m).

    Unlike loads it counts what the router offers each expert, not what it chose (Chen et al. 2026,
    arXiv:2605.15403). Starts uniform, where the loss has no gradient.
    """

    def __init__(self, routers: Mapping[int, Router], rate: float = 0.01) -> None:
        self.rate = rate
        self.means = {
            layer: torch.full((router.num_experts,), 1.0 / router.num_experts, device=router.bias_E.device)
            for layer, router in routers.items()
        }

    @torch.no_grad()
    def measure(self, layer: int, record: RoutingRecord) -> Tensor | None:
        """Sums over tokens of their normalised scores, fp64 [E]."""
        return probabilities(record).double().sum(0) if layer in self.means else None

    @torch.no_grad()
    def follow(self, sums: Mapping[int, Tensor]) -> None:
        for layer, sum_E in sums.items():
            mean_E, total = self.means[layer], sum_E.sum()
            now_E = torch.where(total > 0, sum_E / total.clamp(min=1e-20), mean_E.double())
            mean_E.add_((now_E - mean_E.double()).float(), alpha=self.rate)

    def update(
        self,
        demand: Mapping[int, Tensor],
        num_tokens: float = 0.0,
        losses: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Nothing: the demand of the step is not what this controller follows."""

    def tensors(self) -> dict[str, Tensor]:
        return {f"phi.{layer}": mean_E for layer, mean_E in self.means.items()}

    def signals(self) -> dict[str, dict[int, Tensor]]:
        return {POPULATION: self.means}


def _needed(terms: Terms) -> bool:
    return any(term.name == "phi" for term in terms)


def _check(options: PopulationOptions, terms: Terms) -> None:
    if not _needed(terms):
        names = [term.name for term in terms]
        raise ValueError(
            f"rate={options.rate} is not used by balance.losses={names}: leave the controller out, or "
            "add phi to them"
        )


@register_controller(
    "phi",
    PopulationOptions,
    needed=_needed,
    check=_check,
    refuses=without_scores,
    what="an exponential mean of each layer's mean scores, by which the loss `phi` sets its prices; on by "
    "itself where that loss is",
)
def _build(options: PopulationOptions, routers: Mapping[int, Router]) -> Controller:
    scored = {layer: router for layer, router in routers.items() if router.has_scores}
    return PopulationLoad(scored, options.rate)
