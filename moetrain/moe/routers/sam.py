"""SAM, Switch and Mixture: one group of experts a token, and its k best there (Jiang et al. 2021).

Source: arXiv:2110.07431, which was not read, by the gate ``SAMGate`` of PKU-DAIR/Hetu, which is not the
authors' code. Its two kernels for groups agree where there are as many groups as experts in each; here a
group is E / M neighbouring experts, so that with M devices all experts of a token lie on one.

Shapes: T tokens, E experts, M groups, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Optional

import torch
from torch import Tensor

from moetrain.arithmetic import divisor_near
from moetrain.bounds import at_least
from moetrain.moe.assign import from_token_choice
from moetrain.moe.combine import Combine
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.smooth_choice import valid_mean
from moetrain.moe.topk_ops import first_max, softmax, top_ids

_MOST_GROUPS = 8  # of the default: the devices of a node, as in the released gate


@dataclass(frozen=True)
class SamOptions(RouterConfig):
    name: str = "sam"
    top_k: Optional[int] = None  # null: 2, or 1 where there is one expert
    # null: the most up to 8 that divide the experts and hold twice top_k each, or 1
    num_groups: Optional[int] = field(default=None, metadata=at_least(1))

    def expert_groups(self) -> int:
        return self.num_groups or 1

    def groups_of(self, num_experts: int) -> int:
        """The number of groups M; it is not checked that M divides the experts."""
        if self.num_groups is not None:
            return self.num_groups
        least = 2 * resolve_top_k(self.top_k, num_experts)  # as many as are taken would leave no choice
        fitting = [
            m for m in range(1, _MOST_GROUPS + 1) if num_experts % m == 0 and num_experts // m >= least
        ]
        return max(fitting, default=1)

    def combine(self, num_experts: int) -> Combine:
        return Combine.of_softmax(resolve_top_k(self.top_k, num_experts), num_experts, self.drops)


@register("sam", SamOptions, "Jiang et al. 2021, arXiv:2110.07431", "k experts of one group of them")
class SamRouter(LinearRouter):
    """Softmax over all experts; the group of the highest sum; its k best experts, weighed by probability.

    The penalty is the alignment loss: what experts of other groups have more than the least that is taken,
    ``sum_e max(p_e - p_k, 0)``, a mean over tokens (that gate adds up). p_k has no gradient, as there.
    Raises ValueError where M does not divide E, or a group holds fewer than k experts.
    """

    options: SamOptions
    top_k: int
    reads_bias = True
    has_penalty = True

    def __init__(self, d_model: int, num_experts: int, options: SamOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)
        self.num_groups = options.groups_of(num_experts)
        if num_experts % self.num_groups:
            raise ValueError(
                f"router.num_groups={self.num_groups} must divide num_experts={num_experts}: "
                f"take {divisor_near(num_experts, self.num_groups)}"
            )
        if self.top_k > num_experts // self.num_groups:
            raise ValueError(
                f"router.top_k={self.top_k} exceeds the {num_experts // self.num_groups} experts of one of "
                f"router.num_groups={self.num_groups} groups: lower one of the two"
            )

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = softmax(logits_TE)
        selection_TME = (scores_TE.detach() + self.bias_E).unflatten(-1, (self.num_groups, -1))
        size = selection_TME.shape[-1]
        group_T = first_max(selection_TME.sum(-1))
        own_TE = selection_TME.gather(1, group_T[:, None, None].expand(-1, 1, size)).squeeze(1)
        ids_TK = top_ids(own_TE, self.top_k) + group_T[:, None] * size
        weights_TK = scores_TE.gather(-1, ids_TK)
        routing = from_token_choice(ids_TK, weights_TK, ctx, self.num_experts, scores_TE, logits_TE)
        outside_TE = torch.arange(self.num_experts, device=ids_TK.device) // size != group_T[:, None]
        least_T1 = weights_TK.detach().amin(-1, keepdim=True)
        excess_T = ((scores_TE - least_T1).clamp(min=0) * outside_TE).sum(-1)
        return replace(routing, penalty=valid_mean(excess_T, ctx))
