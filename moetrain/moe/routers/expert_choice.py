"""Expert choice: each expert takes its best tokens of a group (Zhou et al. 2022, arXiv:2202.09368).

Not causal: whether a token is taken depends on later ones. Evaluation and generation therefore take a token
where its score passes a threshold per expert, a running mean of the lowest score that was taken in training;
``group`` is the same choice as in training, which leaks.

Shapes: T tokens, E experts, G groups of L tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Optional

import torch
from torch import Tensor

from moetrain.moe.assign import from_mask
from moetrain.moe.context import RouterContext
from moetrain.moe.evaluation import Words
from moetrain.moe.groups import by_group
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import softmax, top_ids


@dataclass(frozen=True)
class ExpertChoiceOptions(RouterConfig):
    name: str = "expert_choice"
    experts_per_token: float = 2.0  # on average: an expert takes this share of a group's tokens / experts
    max_experts: Optional[int] = None  # of one token; null: no cap
    threshold_decay: float = 0.95

    def evaluation_rule(self, num_experts: int) -> Words:
        return {"rule": "expert_choice"}


@register(
    "expert_choice",
    ExpertChoiceOptions,
    "Zhou et al. 2022, arXiv:2202.09368",
    "the same number of tokens for every expert",
)
class ExpertChoiceRouter(LinearRouter):
    """Every expert takes ceil(group's tokens * experts_per_token / E) tokens; weights are softmax scores.

    With ``max_experts`` the choice is the stable one: an expert proposes to its best tokens, a token keeps
    the experts of its highest scores, and a refused expert proposes to its next (deferred acceptance).
    """

    causal = False
    eval_modes = ("threshold", "group")
    _fp32_buffers = ("bias_E", "threshold_E")
    threshold_E: Tensor

    def __init__(self, d_model: int, num_experts: int, options: ExpertChoiceOptions) -> None:
        super().__init__(d_model, num_experts, options)
        if not 0 < options.experts_per_token <= num_experts and num_experts > 1:
            raise ValueError(
                f"router.experts_per_token={options.experts_per_token} must lie in (0, {num_experts}]"
            )
        cap = options.max_experts
        if cap is not None and not options.experts_per_token <= cap <= num_experts:
            raise ValueError(
                f"router.max_experts={cap} must lie between experts_per_token="
                f"{options.experts_per_token} and num_experts={num_experts}"
            )
        self.share = min(options.experts_per_token / num_experts, 1.0)  # of a group's tokens, per expert
        self.register_buffer("threshold_E", torch.full((num_experts,), 1 / num_experts, dtype=torch.float32))

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = softmax(logits_TE)
        if not self.training and self.eval_mode == "threshold":
            mask_TE = ~(scores_TE.detach() < self.threshold_E)  # NaN is taken: the loss is to tell of it
            return from_mask(mask_TE, scores_TE, ctx, scores_TE, logits_TE)
        groups = by_group(scores_TE.detach(), ctx, self.options.group)
        mask_GLE, stats = self._choose(groups.values_GLC, groups.valid_GL)
        routing = from_mask(groups.own(mask_GLE), scores_TE, ctx, scores_TE, logits_TE)
        return replace(routing, stats=stats)  # only a training step sums them

    def _choose(self, scores_GLE: Tensor, valid_GL: Tensor) -> tuple[Tensor, Tensor]:
        """(chosen [G, L, E], statistics [E + 1]: sum of the lowest chosen scores, groups that chose)."""
        scores_GLE = scores_GLE.nan_to_num(2.0)  # every expert takes what is NaN: the loss is to tell of it
        taken_G11 = (valid_GL.sum(-1).double() * self.share - 1e-9).ceil()[:, None, None]
        ranked_GLE = scores_GLE.masked_fill(~valid_GL[..., None], -1.0)
        cap = self.options.max_experts  # type: ignore[attr-defined]
        chosen_GLE = torch.zeros_like(ranked_GLE, dtype=torch.bool)
        most = math.ceil(valid_GL.shape[1] * self.share - 1e-9)  # of a group without padding
        while most:
            ids_GEc = top_ids(ranked_GLE.transpose(1, 2), most)
            within_GEc = (torch.arange(most, device=ids_GEc.device) < taken_G11).expand(ids_GEc.shape)
            chosen_GLE = torch.zeros_like(chosen_GLE).scatter_(
                1, ids_GEc.transpose(1, 2), within_GEc.transpose(1, 2)
            ) & (ranked_GLE >= 0)
            if cap is None or not bool((chosen_GLE.sum(-1) > cap).any()):
                break
            offers_GLE = scores_GLE.where(chosen_GLE, -1.0)
            kept_GLE = torch.zeros_like(chosen_GLE).scatter_(-1, top_ids(offers_GLE, cap), True)
            ranked_GLE = ranked_GLE.masked_fill(chosen_GLE & ~kept_GLE, -1.0)  # refused for good
        lowest_GE = scores_GLE.where(chosen_GLE, 2.0).amin(1) if scores_GLE.shape[1] else ranked_GLE.sum(1)
        chose_GE = chosen_GLE.any(1)
        sums_E = lowest_GE.double().where(chose_GE, 0.0).sum(0)
        return chosen_GLE, torch.stack([sums_E, chose_GE.double().sum(0)])

    @torch.no_grad()
    def after_step(self, stats: Tensor) -> None:
        """The threshold follows the mean, over the step's groups, of the lowest score an expert took."""
        decay = self.options.threshold_decay  # type: ignore[attr-defined]
        sums_E, groups_E = stats.to(self.threshold_E.device)
        now_E = torch.where(groups_E > 0, sums_E / groups_E.clamp(min=1), self.threshold_E.double())
        self.threshold_E.copy_(decay * self.threshold_E + (1 - decay) * now_E)
