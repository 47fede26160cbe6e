"""ReMoE's coefficient, which follows the share of inactive pairs of a token and an expert."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moetrain.bounds import above
from moetrain.moe.balance.controllers.base import Controller, Terms, register_controller
from moetrain.moe.routers import Router


@dataclass(frozen=True)
class SparsityOptions:
    rate: float = field(default=1.2, metadata=above(1, "it is a factor"))


class SparsityController(Controller):
    """ReMoE's coefficient of ``l1``: multiplied by ``rate`` while too many experts are active, else divided.

    ``coef = start * rate ** n`` over all layers together (Wang et al. 2024, eq. 8): n grows by one where the
    share of inactive pairs of a token and an expert lies below 1 - k / E, and falls by one elsewhere; both
    are of the pairs of all layers. The loss counts assignments per token, so a layer's k divides its
    coefficient there.

    Training passes three stages (their section 3.4), by the share of inactive pairs: 1, dense, until it
    has gone a tenth of its way from the first step's to the target; 2, sparsifying, until it first reaches
    the target; 3, sparse. The state is n, the stage, and the first step's share.
    """

    def __init__(
        self,
        experts: Mapping[int, int],
        target_k: Mapping[int, int],
        rate: float = 1.2,
        start: float = 1e-8,
    ) -> None:
        """A layer's place -> the number of its experts, and how many a token is to use there."""
        self.experts, self.target_k, self.rate, self.start = dict(experts), dict(target_k), rate, start
        self.exponent = torch.zeros((), dtype=torch.int64)
        self.stage = torch.zeros((), dtype=torch.int64)  # 0: before the first step
        self.first = torch.zeros((), dtype=torch.float64)
        self.sparsity = math.nan
        self._messages: list[str] = []

    @property
    def coef(self) -> float:
        return self.start * self.rate ** int(self.exponent)

    @property
    def target(self) -> float:
        return 1 - sum(self.target_k.values()) / sum(self.experts.values())

    def update(
        self, demand: Mapping[int, Tensor], num_tokens: float, losses: Mapping[str, Tensor] | None = None
    ) -> None:
        self._messages = []
        routed = [layer for layer in self.experts if layer in demand]
        pairs = num_tokens * sum(self.experts[layer] for layer in routed)
        if pairs:
            self.sparsity = 1 - sum(int(demand[layer].sum()) for layer in routed) / pairs
            self.exponent += 1 if self.sparsity < self.target else -1
            self._follow()

    def _follow(self) -> None:
        """The stage, which never goes back, and the line that says so."""
        if int(self.stage) == 0:
            self.first.fill_(self.sparsity)
        started = self.sparsity > self.first + 0.1 * (self.target - self.first)
        stage = 3 if self.sparsity >= self.target else 2 if started else 1
        if stage > int(self.stage):
            self.stage.fill_(stage)
            name = ("dense", "sparsifying", "sparse")[stage - 1]
            line = (
                f"sparsity stage {stage} of 3, {name}: {self.sparsity:.3f} of all pairs of a token and an "
                f"expert are inactive, target {self.target:.3f}, coefficient {self.coef:.2g}"
            )
            self._messages = [line]

    def tensors(self) -> dict[str, Tensor]:
        state = {"exponent": self.exponent, "stage": self.stage, "first": self.first}
        return {f"sparsity_{key}": tensor for key, tensor in state.items()}

    def factors(self) -> dict[str, dict[int, float]]:
        return {"l1": {layer: self.coef / k for layer, k in self.target_k.items()}}

    def metrics(self) -> dict[str, float]:
        return {"sparsity": self.sparsity, "sparsity_coef": self.coef, "sparsity_stage": int(self.stage)}

    def messages(self) -> list[str]:
        return self._messages


def _check(options: SparsityOptions, terms: Terms) -> None:
    if "l1" not in (names := [term.name for term in terms]):
        raise ValueError(
            f"rate={options.rate} is not used by balance.losses={names}: leave the controller out, or add l1 "
            "to them"
        )


def _refuses(router: Router) -> str | None:
    return None if router.target_k is not None else "has no mean number of experts a token to aim at"


@register_controller(
    "sparsity",
    SparsityOptions,
    check=_check,
    refuses=_refuses,
    what="ReMoE's: the coefficient of `l1` goes up by the factor `rate` while too many experts are active, "
    "and down by it else",
)
def _build(options: SparsityOptions, routers: Mapping[int, Router]) -> Controller:
    experts = {layer: router.num_experts for layer, router in routers.items()}
    target_k = {n: r.target_k for n, r in routers.items() if r.target_k is not None}
    return SparsityController(experts, target_k, options.rate)
