"""Controllers: small states that follow the whole batch's load, or a loss, once after each optimizer step.

Shapes: L MoE layers, E experts. Counts and losses are global (summed over ranks and micro-batches), so every
rank makes the same update. They come on the host, where the step reads its figures anyway. State is part of
the checkpoint and no cast of the model touches it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from moetrain.moe.routers import Router
from moetrain.ops.transfer import to_device


class Controller(Protocol):
    """Updated after the step; ``tensors`` names what a checkpoint must hold besides the model's buffers.

    ``losses`` of ``update``: a term's key -> its values [L] in this step, without coefficient.
    ``factors``: loss name -> what its coefficient is multiplied with in the next step.
    ``metrics``: name -> a figure to log after the step. ``news``: a line for the user, once, or None.
    """

    def update(self, demand_LE: Tensor, num_tokens: float, losses: Mapping[str, Tensor]) -> None: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def factors(self) -> dict[str, float]: ...

    def metrics(self) -> dict[str, float]: ...

    def news(self) -> str | None: ...


class _Plain:
    """A controller without a state of its own, a say in coefficients, or anything to tell."""

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def factors(self) -> dict[str, float]:
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

    def __init__(self, routers: Sequence[Router], rate: float) -> None:
        self.routers, self.rate = list(routers), rate

    @torch.no_grad()
    def update(
        self, demand_LE: Tensor, num_tokens: float = 0.0, losses: Mapping[str, Tensor] | None = None
    ) -> None:
        load_LE = demand_LE.to(torch.float64)
        sign_LE = torch.sign(load_LE.mean(-1, keepdim=True) - load_LE)
        sign_LE = to_device(sign_LE, self.routers[0].bias_E.device)
        for router, sign_E in zip(self.routers, sign_LE, strict=True):
            router.bias_E += self.rate * sign_E.to(router.bias_E)


class RunningLoad(_Plain):
    """An exponential mean of the load shares, for the ``running`` scope: one step behind, and cheap.

    Starts uniform, where the loss has the value 1 and no gradient.
    """

    def __init__(self, num_layers: int, num_experts: int, decay: float = 0.9) -> None:
        self.decay = decay
        self.share_LE = torch.full((num_layers, num_experts), 1.0 / max(num_experts, 1))

    @torch.no_grad()
    def update(
        self, demand_LE: Tensor, num_tokens: float = 0.0, losses: Mapping[str, Tensor] | None = None
    ) -> None:
        load_LE = demand_LE.double()
        total_L1 = load_LE.sum(-1, keepdim=True)
        # a layer that routed nothing teaches nothing: its row keeps its value, and its sum of 1
        share_LE = torch.where(total_L1 > 0, load_LE / total_L1.clamp(min=1), self.share_LE)
        self.share_LE.mul_(self.decay).add_(share_LE.float(), alpha=1 - self.decay)

    def tensors(self) -> dict[str, Tensor]:
        return {"running_load": self.share_LE}


class SparsityController(_Plain):
    """ReMoE's coefficient of ``l1``: up by ``rate`` while too many experts are active, else down by it.

    ``coef = start * rate ** n`` over all layers together (Wang et al. 2024, eq. 8): n grows by one where the
    share of inactive pairs of a token and an expert lies below 1 - k / E, and falls by one elsewhere. The
    loss counts assignments per token, so k divides its coefficient.

    Training passes three stages (their section 3.4), told by the share of inactive pairs: 1, dense, until it
    has gone a tenth of its way from the first step's to the target; 2, sparsifying, until it first reaches
    the target; 3, sparse. The state is n, the stage, and the first step's share.
    """

    def __init__(self, num_experts: int, target_k: int, rate: float = 1.2, start: float = 1e-8) -> None:
        self.num_experts, self.target_k, self.rate, self.start = num_experts, target_k, rate, start
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
        return 1 - self.target_k / self.num_experts

    def update(
        self, demand_LE: Tensor, num_tokens: float, losses: Mapping[str, Tensor] | None = None
    ) -> None:
        pairs = num_tokens * demand_LE.shape[0] * self.num_experts
        if pairs:
            self.sparsity = 1 - float(demand_LE.sum()) / pairs
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

    def factors(self) -> dict[str, float]:
        return {"l1": self.coef / self.target_k}

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
        self, name: str, max_factor: float, min_factor: float = 1.025, hold: int = 1000, every: int = 100
    ) -> None:
        self.name, self.max_factor, self.min_factor = name, max_factor, min_factor
        self.hold, self.every = hold, every
        self.step = torch.zeros((), dtype=torch.int64)
        self.factor = torch.ones((), dtype=torch.float64)
        self.mean, self.sum = torch.zeros_like(self.factor), torch.zeros_like(self.factor)

    def update(self, demand_LE: Tensor, num_tokens: float, losses: Mapping[str, Tensor]) -> None:
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

    def factors(self) -> dict[str, float]:
        return {self.name: float(self.factor)}

    def metrics(self) -> dict[str, float]:
        return {f"{self.name}_factor": float(self.factor)}
