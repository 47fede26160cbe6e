"""DynMoE: top-any gating, and experts that come and go (Guo et al. 2024, arXiv:2405.14297).

A token takes every expert whose score lies above the expert's own learnt threshold. Between steps an expert
that no token took is put to sleep, and one is woken where tokens took nobody; ``num_experts`` is the most.

Shapes: T tokens, D model, E experts (asleep ones included), S = E + 1 + D statistics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.bounds import at_least, within
from moetrain.moe.assign import from_mask
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import Router, register
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import first_max
from moetrain.ops.init import Constant, Orthogonal, parameter
from moetrain.ops.local_part import set_row

_MAX_LOG_SCALE = math.log(100)


@dataclass(frozen=True)
class DynMoEOptions(RouterConfig):
    name: str = "dynmoe"
    initial_experts: Optional[int] = None  # awake at the start; null: all
    # steps between two decisions on who is awake; 0: never
    interval: int = field(default=100, metadata=at_least(0))
    # where the factor of the cosines starts: 10, learnt, in one release of the authors; 1, fixed, in another
    tau: float = field(default=10.0, metadata=within(0, 100, open_low=True))
    learn_tau: bool = True


@register(
    "dynmoe",
    DynMoEOptions,
    "Guo et al. 2024, arXiv:2405.14297",
    "any number of experts a token",
)
class DynMoERouter(Router):
    """Score s = sigmoid(tau cos(x, w_e)), threshold sigmoid(tau g_e); active experts weigh 1 / their number.

    The gradient of a gate is that of s minus its threshold, straight through the step function. A token that
    takes nobody gets nothing in training, and its best expert in evaluation. The Routing's penalty is the
    paper's "diverse and simple" loss: ||W W' - 1|| of the directions of experts awake, plus their mean norm.
    Raises ValueError for ``initial_experts`` outside 1 to E or a negative interval.
    """

    options: DynMoEOptions
    has_penalty = has_choices = True
    awake_E: Tensor
    taken_E: Tensor
    missed_1: Tensor
    missed_D: Tensor
    steps: Tensor
    _fp32_buffers = ("bias_E", "missed_D")

    def __init__(self, d_model: int, num_experts: int, options: DynMoEOptions) -> None:
        super().__init__(d_model, num_experts, options)
        initial = num_experts if options.initial_experts is None else options.initial_experts
        if not 1 <= initial <= num_experts:
            raise ValueError(
                f"router.initial_experts={initial} must lie between 1 and num_experts={num_experts}"
            )
        self.weight_ED = parameter((num_experts, d_model), Orthogonal())
        self.threshold_E = parameter((num_experts,), Constant(0.0))
        self.log_tau_1 = parameter((1,), Constant(math.log(options.tau)))
        self.register_buffer("awake_E", torch.arange(num_experts) < initial)
        self.register_buffer("taken_E", torch.zeros(num_experts, dtype=torch.int64))
        self.register_buffer("missed_1", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("missed_D", torch.zeros(d_model, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def rows_ED(self) -> Tensor:
        return self.weight_ED

    def logits(self, x_TD: Tensor) -> Tensor:
        """tau cos(x, w_e), [T, E]."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        x_TD, directions_ED = x_TD.to(dtype), F.normalize(self.weight_ED.to(dtype), dim=-1)
        norm_T1 = x_TD.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        cosine_TE: Tensor = F.linear(x_TD, directions_ED) / norm_T1  # T x E numbers, never T x D
        return self._tau(dtype) * cosine_TE

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.sigmoid() * self.awake_E
        thresholds_E = (self._tau(scores_TE.dtype) * self.threshold_E.to(scores_TE.dtype)).sigmoid()
        over_TE = scores_TE - thresholds_E
        # a score of 0, asleep, is over no threshold; NaN is, so that the step's loss shows it
        active_TE = ~(over_TE.detach() <= 0)
        missed_T = ~active_TE.any(-1)
        if not self.training:
            ranked_TE = scores_TE.detach().masked_fill(~self.awake_E, -1.0)
            best_T1 = first_max(ranked_TE)[:, None]
            active_TE = active_TE | torch.zeros_like(active_TE).scatter(1, best_T1, missed_T[:, None])
        gates_TE = 1 + (over_TE - over_TE.detach())
        weights_TE = gates_TE / active_TE.sum(-1, keepdim=True).clamp(min=1)
        routing = from_mask(active_TE, weights_TE, ctx, scores_TE, logits_TE)
        stats = self._stats(routing, x_TD, missed_T)
        choices_TE = gates_TE * active_TE
        return replace(routing, stats=stats, penalty=self._penalty(scores_TE.dtype), choices_TE=choices_TE)

    def _tau(self, dtype: torch.dtype) -> Tensor:
        log_tau_1: Tensor = self.log_tau_1
        if not self.options.learn_tau:
            log_tau_1 = log_tau_1.detach() + 0 * log_tau_1  # its gradient is zero, on every rank
        return log_tau_1.to(dtype).clamp(max=_MAX_LOG_SCALE).exp()

    def _penalty(self, dtype: torch.dtype) -> Tensor:
        weight_ED = self.weight_ED.to(dtype)
        directions_ED = F.normalize(weight_ED, dim=-1) * self.awake_E[:, None]
        gram_EE = directions_ED @ directions_ED.t() - torch.diag(self.awake_E.to(dtype))
        diverse = (gram_EE.square().sum() + 1e-20).sqrt()  # no gradient of nan where it is 0
        simple: Tensor = (weight_ED.norm(dim=-1) * self.awake_E).sum() / self.awake_E.sum()
        return diverse + simple

    @torch.no_grad()
    def _stats(self, routing: Routing, x_TD: Tensor, missed_T: Tensor) -> Tensor:
        """[S]: assignments of each expert, tokens that took nobody, and their sum."""
        if routing.valid_T is not None:
            missed_T = missed_T & routing.valid_T
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        missed_D = (missed_T.to(dtype) @ x_TD.to(dtype)).double()
        return torch.cat([routing.assignment.counts_E.double(), missed_T.sum().double()[None], missed_D])

    @torch.no_grad()
    def after_step(self, stats: Tensor) -> None:
        """Add up the statistics. Every ``interval`` steps unused experts are put to sleep, and one may wake.

        One wakes if tokens took no expert: its direction becomes the sum of these tokens, its threshold 0,
        and its network stays as it is. At least one expert stays awake. All ranks get the same statistics, so
        they decide alike.
        """
        stats = stats.to(self.missed_D.device)
        self.taken_E += stats[: self.num_experts].long()
        self.missed_1 += stats[self.num_experts].long()
        self.missed_D += stats[self.num_experts + 1 :]
        self.steps += 1
        if not self.options.interval or int(self.steps) % self.options.interval:
            return
        used_E = self.awake_E & (self.taken_E > 0)
        if bool(used_E.any()):
            self.awake_E.copy_(used_E)
        asleep = (~self.awake_E).nonzero()
        if int(self.missed_1) and asleep.numel() and bool(self.missed_D.any()):
            slot = int(asleep[0])
            set_row(self.weight_ED, slot, F.normalize(self.missed_D, dim=0))
            set_row(self.threshold_E, slot, torch.zeros(()))
            self.awake_E[slot] = True
        for buffer in (self.taken_E, self.missed_1, self.missed_D):
            buffer.zero_()
