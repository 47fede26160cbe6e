"""Controllers: small states that follow the whole batch's load, or a loss, once after each optimizer step.

Shapes: L MoE layers, E experts of one layer. Layers go by their places in the decoder, each with experts of
its own number. Counts and losses are global (summed over ranks and micro-batches), so every rank makes the
same update. They come on the host, where the step reads its figures anyway. State is part of the checkpoint
and no cast of the model touches it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from moetrain.moe.routers import Router
from moetrain.ops.transfer import to_device


class Controller(Protocol):
    """Updated after the step; ``tensors`` names what a checkpoint must hold besides the model's buffers.

    ``demand`` of ``update``: a layer's place -> the assignments [E] that its router wanted; ``losses``: a
    term's key -> its values [L] in this step, of the layers in ``demand``, without coefficient.
    ``factors``: loss name -> a layer's place -> what its coefficient is multiplied with in the next step.
    ``metrics``: name -> a figure to log after the step. ``news``: a line for the user, once, or None.
    """

    def update(
        self, demand: Mapping[int, Tensor], num_tokens: float, losses: Mapping[str, Tensor]
    ) -> None: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def factors(self) -> dict[str, dict[int, float]]: ...

    def metrics(self) -> dict[str, float]: ...

    def news(self) -> str | None: ...


class _Plain:
    """A controller without a state of its own, a say in coefficients, or anything to tell."""

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def factors(self) -> dict[str, dict[int, float]]:
        return {}

    def metrics(self) -> dict[str, float]:
        return {}

    def news(self) -> str | None:
        return None


class BiasController(_Plain):
    """Aux-loss-free balance: each expert's selection bias moves by ``rate`` towards the mean load.

    ``b_e += rate * sign(mean(c) - c_e)`` (Wang et al. 2024; DeepSeek-V3, section 2.1.2). The bias is the
    router's own buffer, so the checkpoint holds it with the model.
    """

    def __init__(self, routers: Mapping[int, Router], rate: float) -> None:
        self.routers, self.rate = dict(routers), rate

    @torch.no_grad()
    def update(
        self,
        demand: Mapping[int, Tensor],
        num_tokens: float = 0.0,
        losses: Mapping[str, Tensor] | None = None,
    ) -> None:
        told = [
            (self.routers[layer], demand_E) for layer, demand_E in demand.items() if layer in self.routers
        ]
        if not told:
            return
        loads = [demand_E.to(torch.float64) for _, demand_E in told]
        signs = torch.cat([torch.sign(load_E.mean() - load_E) for load_E in loads])
        signs = to_device(signs, told[0][0].bias_E.device)  # of all layers in one copy
        for (router, _), sign_E in zip(told, signs.split([len(load_E) for load_E in loads]), strict=True):
            router.bias_E += self.rate * sign_E.to(router.bias_E)


class RunningLoad(_Plain):
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
        for layer, share_E in self.shares.items():
            load_E = demand[layer].double() if layer in demand else torch.zeros(len(share_E)).double()
            total = load_E.sum()
            # a layer that routed nothing teaches nothing: it keeps its shares, and their sum of 1
            new_E = torch.where(total > 0, load_E / total.clamp(min=1), share_E)
            share_E.mul_(self.decay).add_(new_E.float(), alpha=1 - self.decay)

    def tensors(self) -> dict[str, Tensor]:
        return {f"running_load.{layer}": share_E for layer, share_E in self.shares.items()}


class SparsityController(_Plain):
    """ReMoE's coefficient of ``l1``: up by ``rate`` while too many experts are active, else down by it.

    ``coef = start * rate ** n`` over all layers together (Wang et al. 2024, eq. 8): n grows by one where the
    share of inactive pairs of a token and an expert lies below 1 - k / E, and falls by one elsewhere; both
    are of the pairs of all layers. The loss counts assignments per token, so a layer's k divides its
    coefficient there.

    Training passes three stages (their section 3.4), told by the share of inactive pairs: 1, dense, until it
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
        self._news: str | None = None

    @property
    def coef(self) -> float:
        return self.start * self.rate ** int(self.exponent)

    @property
    def target(self) -> float:
        return 1 - sum(self.target_k.values()) / sum(self.experts.values())

    def update(
        self, demand: Mapping[int, Tensor], num_tokens: float, losses: Mapping[str, Tensor] | None = None
    ) -> None:
        told = [layer for layer in self.experts if layer in demand]
        pairs = num_tokens * sum(self.experts[layer] for layer in told)
        if pairs:
            self.sparsity = 1 - sum(int(demand[layer].sum()) for layer in told) / pairs
            self.exponent += 1 if self.sparsity < self.target else -1
            self._follow()

    def _follow(self) -> None:
        """The stage, which never goes back, and the line that says so."""
        self._news = None
        if int(self.stage) == 0:
            self.first.fill_(self.sparsity)
        started = self.sparsity > self.first + 0.1 * (self.target - self.first)
        stage = 3 if self.sparsity >= self.target else 2 if started else 1
        if stage > int(self.stage):
            self.stage.fill_(stage)
            name = ("dense", "sparsifying", "sparse")[stage - 1]
            self._news = (
                f"sparsity stage {stage} of 3, {name}: {self.sparsity:.3f} of all pairs of a token and an "
                f"expert are inactive, target {self.target:.3f}, coefficient {self.coef:.2g}"
            )

    def tensors(self) -> dict[str, Tensor]:
        state = {"exponent": self.exponent, "stage": self.stage, "first": self.first}
        return {f"sparsity_{key}": tensor for key, tensor in state.items()}

    def factors(self) -> dict[str, dict[int, float]]:
        return {"l1": {layer: self.coef / k for layer, k in self.target_k.items()}}

    def metrics(self) -> dict[str, float]:
        return {"sparsity": self.sparsity, "sparsity_coef": self.coef, "sparsity_stage": int(self.stage)}

    def news(self) -> str | None:
        return self._news


class LossFollower(_Plain):
    """BlockFFN's coefficient of ``chunk_sparsity``, which follows the loss: where that rises, so does it.

    For the first ``hold`` steps the coefficient's factor is 1. Then, after each ``every`` steps, it is
    multiplied with the ratio of the loss's mean over these steps to its mean over the ``every`` before; a
    ratio above 1 is at least ``min_factor``, and the factor at most ``max_factor`` (Song et al. 2025). The
    released code goes there linearly over the next ``every`` steps, this at once.

    The state is the number of steps, and in fp64 the factor, the last mean and the sum of the mean to come.
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
        self.mean, self.sum = torch.zeros_like(self.factor), torch.zeros_like(self.factor)

    def update(self, demand: Mapping[int, Tensor], num_tokens: float, losses: Mapping[str, Tensor]) -> None:
        self.step += 1
        self.sum += losses[self.name].double().sum()
        if int(self.step) % self.every:
            return
        new, old = float(self.sum) / self.every, float(self.mean)
        if int(self.step) >= self.hold and new > 0 and old > 0:  # a loss of 0 has no ratio to follow
            ratio = new / old
            ratio = max(ratio, self.min_factor) if ratio > 1 else ratio
            self.factor.mul_(ratio).clamp_(max=self.max_factor)
        self.mean.fill_(new)
        self.sum.zero_()

    def tensors(self) -> dict[str, Tensor]:
        state = {"step": self.step, "factor": self.factor, "mean": self.mean, "sum": self.sum}
        return {f"{self.name}_{key}": tensor for key, tensor in state.items()}

    def factors(self) -> dict[str, dict[int, float]]:
        return {self.name: dict.fromkeys(self.layers, float(self.factor))}

    def metrics(self) -> dict[str, float]:
        return {f"{self.name}_factor": float(self.factor)}
