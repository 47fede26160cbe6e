"""A running mean of the load, which the ``running`` scope reads. Shapes: E experts of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moetrain.bounds import within
from moetrain.moe.balance.controllers.base import Controller, Terms, register_controller
from moetrain.moe.balance.load_share import RUNNING
from moetrain.moe.routers import Router


@dataclass(frozen=True)
class RunningOptions:
    decay: float = field(default=0.9, metadata=within(0, 1, open_high=True))


class RunningLoad(Controller):
    """An exponential mean of the load shares, for the ``running`` scope: one step behind, and cheap.

    Starts uniform, where the loss has the value 1 and no gradient.
    """

    def __init__(self, experts: Mapping[int, int], decay: float = 0.9) -> None:
        """``experts``: a layer's place -> the number of its experts."""
        self.decay = decay
        self.shares = {layer: torch.full((number,), 1.0 / number) for layer, number in experts.items()}

    @torch.no_grad()
    def update(
        self,
        demand: Mapping[int, Tensor],
        num_tokens: float = 0.0,
        losses: Mapping[str, Tensor] | None = None,
    ) -> None:
        for layer, demand_E in demand.items():
            if layer not in self.shares:
                continue
            load_E, share_E = demand_E.double(), self.shares[layer]
            total = load_E.sum()
            # a layer that routed nothing keeps its shares, and their sum of 1
            new_E = torch.where(total > 0, load_E / total.clamp(min=1), share_E)
            share_E.mul_(self.decay).add_(new_E.float(), alpha=1 - self.decay)

    def tensors(self) -> dict[str, Tensor]:
        return {f"running_load.{layer}": share_E for layer, share_E in self.shares.items()}

    def signals(self) -> dict[str, dict[int, Tensor]]:
        return {RUNNING: self.shares}


def _needed(terms: Terms) -> bool:
    return any(term.spec.scopes and term.scope == "running" for term in terms)


def _check(options: RunningOptions, terms: Terms) -> None:
    if not _needed(terms):
        raise ValueError(
            f"decay={options.decay} is not used: no loss has scope=running; leave the controller out"
        )


@register_controller(
    RUNNING,
    RunningOptions,
    needed=_needed,
    check=_check,
    what="an exponential mean of each layer's load shares; on by itself where a loss has `scope: running`",
)
def _build(options: RunningOptions, routers: Mapping[int, Router]) -> Controller:
    return RunningLoad({layer: router.num_experts for layer, router in routers.items()}, options.decay)
