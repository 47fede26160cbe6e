"""MoGE: as many experts from each group, so that devices that hold a group each are never uneven.

Shapes: T tokens, E experts, M groups, K top-k. Source: Tang et al. 2025 (Pangu Pro MoE), arXiv:2505.21411.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor

from moetrain.arithmetic import divisor_near
from moetrain.bounds import at_least
from moetrain.moe.assign import from_token_choice
from moetrain.moe.context import RouterContext
from moetrain.moe.evaluation import Words, token_choice
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import softmax, top_ids


@dataclass(frozen=True)
class GroupedOptions(RouterConfig):
    name: str = "grouped"
    top_k: Optional[int] = None
    # null: top_k where it divides the experts, else 1
    num_groups: Optional[int] = field(default=None, metadata=at_least(1))

    def evaluation_rule(self, num_experts: int) -> Words:
        top_k, groups = resolve_top_k(self.top_k, num_experts), self.groups_of(num_experts)
        return token_choice(top_k, num_groups=groups, per_group=top_k // groups)

    def expert_groups(self) -> int:
        return self.num_groups or 1

    def groups_of(self, num_experts: int) -> int:
        """The number of groups M; it is not checked that M divides the experts and K."""
        top_k = resolve_top_k(self.top_k, num_experts)
        default = top_k if num_experts % top_k == 0 else 1
        return default if self.num_groups is None else self.num_groups


@register("grouped", GroupedOptions, "Tang et al. 2025, arXiv:2505.21411", "k / M experts of each group")
class GroupedRouter(LinearRouter):
    """Softmax over all experts; each of M groups gives its K / M best. Weights are not renormalised."""

    top_k: int
    reads_bias = True
    replays = True

    def __init__(self, d_model: int, num_experts: int, options: GroupedOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)
        self.num_groups = options.groups_of(num_experts)
        for key, value in (("top_k", self.top_k), ("model.num_experts", num_experts)):
            if value % self.num_groups:
                raise ValueError(
                    f"router.num_groups={self.num_groups} must divide {key}={value}: "
                    f"take {divisor_near(value, self.num_groups)}"
                )

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = softmax(logits_TE)
        per_group, size = self.top_k // self.num_groups, self.num_experts // self.num_groups
        selection_TE = scores_TE.detach() + self.bias_E
        ids_TMk = top_ids(selection_TE.unflatten(-1, (self.num_groups, size)), per_group)
        starts_M1 = torch.arange(0, self.num_experts, size, device=ids_TMk.device)[:, None]
        ids_TK = (ids_TMk + starts_M1).flatten(-2) if ctx.forced_TK is None else ctx.forced_TK
        return from_token_choice(
            ids_TK, scores_TE.gather(-1, ids_TK), ctx, self.num_experts, scores_TE, logits_TE
        )
