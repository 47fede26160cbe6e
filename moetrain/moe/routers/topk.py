"""Top-k token choice: softmax before or after selection, sigmoid scores, group-limited selection.

Shapes: T tokens, D model, E experts, K top-k, M groups of experts.
Sources: Shazeer et al. 2017; Fedus et al. 2021 (k = 1, jitter); Jiang et al. 2024 (Mixtral: softmax over the
chosen); DeepSeek-AI 2024 (V3: sigmoid scores, a bias for selection only, group-limited selection).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Optional

import torch
from torch import Tensor

from moetrain.arithmetic import divisor_near
from moetrain.bounds import at_least, within
from moetrain.kernels.router.rule import Rule
from moetrain.moe.assign import from_token_choice
from moetrain.moe.combine import Combine
from moetrain.moe.context import RouterContext
from moetrain.moe.evaluation import Words, token_choice
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.token_choice import Chosen, choose_experts, choose_given
from moetrain.ops.init import Constant, parameter

_JITTER_SALT = 0x717E


class Score(Enum):
    """``softmax`` over all experts; ``softmax_after``: over the chosen ones only; ``sigmoid`` each."""

    softmax = "softmax"
    softmax_after = "softmax_after"
    sigmoid = "sigmoid"


class GroupScore(Enum):
    """What ranks a group of experts: the sum of its two best selection scores (DeepSeek-V3), or its best."""

    top2 = "top2"
    max = "max"


@dataclass(frozen=True)
class TopKOptions(RouterConfig):
    name: str = "topk"
    top_k: Optional[int] = None  # null: 2, or 1 where there is one expert
    score: Score = Score.softmax
    renormalize: bool = True  # chosen weights sum to 1; with softmax this equals softmax_after
    route_scale: float = 1.0  # multiplies the weights
    # training only: inputs times U(1 - jitter, 1 + jitter)
    jitter: float = field(default=0.0, metadata=within(0, 1, open_high=True))
    logit_bias: bool = False  # a learned number of each expert, added to its logit (GPT-OSS)
    num_groups: int = field(default=1, metadata=at_least(1))
    top_groups: Optional[int] = None  # groups a token may choose from; null: all
    group_score: GroupScore = GroupScore.top2

    def evaluation_rule(self, num_experts: int) -> Optional[Words]:
        if self.logit_bias:
            return None  # the words of an export have none
        top_k = resolve_top_k(self.top_k, num_experts)
        words: Words = {"route_scale": self.route_scale}
        if self.score is Score.sigmoid:
            words["score"] = "sigmoid"
        if self.score is Score.softmax_after:
            words["weights"] = "softmax"
        elif self.renormalize:
            words["weights"] = "equal" if top_k == 1 else "sum_to_1"
        if self.top_groups not in (None, self.num_groups):
            words |= {"num_groups": self.num_groups, "top_groups": self.top_groups}
            words["group_best"] = 2 if self.group_score is GroupScore.top2 else 1
        return token_choice(top_k, **words)

    def combine(self, num_experts: int) -> Combine:
        k, scale = resolve_top_k(self.top_k, num_experts), self.route_scale
        limited = self.top_groups not in (None, self.num_groups)
        own_scores = self.score is Score.sigmoid
        facts = Combine(
            top_k=k,
            ties_whole=True,
            drops=self.drops,
            own_scores=own_scores,
            num_groups=self.num_groups if limited else 1,
        )
        if self.renormalize or self.score is Score.softmax_after:
            return replace(facts, even_weight=scale / k, total=scale)
        if own_scores:
            return replace(facts, even_weight=scale / 2)
        return replace(facts, even_weight=scale / num_experts, total=scale if k == num_experts else None)

    def expert_groups(self) -> int:
        return self.num_groups


@register("topk", TopKOptions, "Shazeer et al. 2017, arXiv:1701.06538", "k experts a token")
class TopKRouter(LinearRouter):
    """Each token's K best experts. N = K times the valid tokens.

    Raises ValueError where k > E, groups do not divide E, or the chosen groups hold fewer than k experts.
    """

    options: TopKOptions
    top_k: int
    reads_bias = True
    takes_best = True
    replays = True

    def __init__(self, d_model: int, num_experts: int, options: TopKOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)
        self.logit_bias_E = parameter((num_experts,), Constant(0.0)) if options.logit_bias else None
        _check(options, self.top_k, num_experts)
        self.rule = Rule(
            self.top_k,
            options.score.value,
            options.renormalize,
            options.route_scale,
            options.num_groups,
            options.num_groups if options.top_groups is None else options.top_groups,
            options.group_score.value,
        )
        self.takes_best = self.takes_best and not self.rule.limited  # of its best groups alone

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        if self.training and self.options.jitter:
            x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
            noise_TD = ctx.uniform(tuple(x_TD.shape), _JITTER_SALT).to(x_TD.dtype)
            x_TD = x_TD * (1 + self.options.jitter * (2 * noise_TD - 1))
        logits_TE = self.logits_in(x_TD, ctx)
        chosen = self.choose(logits_TE, ctx.forced_TK)
        return from_token_choice(
            chosen.ids_TK, chosen.weights_TK, ctx, self.num_experts, chosen.scores_TE, logits_TE
        )

    def logits_in(self, x_TD: Tensor, ctx: RouterContext) -> Tensor:
        """[T, E]."""
        logits_TE = self.logits(x_TD)
        return logits_TE if self.logit_bias_E is None else logits_TE + self.logit_bias_E.to(logits_TE.dtype)

    def products_per_token(self) -> int:
        biases = 0 if self.logit_bias_E is None else self.logit_bias_E.numel()
        return super().products_per_token() - biases

    def choose(self, logits_TE: Tensor, forced_TK: Tensor | None = None) -> Chosen:
        """Each token's experts, their weights and all scores."""
        if forced_TK is not None:
            return choose_given(logits_TE, forced_TK, self.rule)
        return choose_experts(logits_TE, self.bias_E, self.rule, self.backend)


def _check(options: TopKOptions, top_k: int, num_experts: int) -> None:
    if num_experts % options.num_groups:
        raise ValueError(
            f"router.num_groups={options.num_groups} must divide num_experts={num_experts}: "
            f"take {divisor_near(num_experts, options.num_groups)}"
        )
    groups = options.num_groups if options.top_groups is None else options.top_groups
    if not 1 <= groups <= options.num_groups:
        raise ValueError(f"router.top_groups={groups} must lie between 1 and num_groups={options.num_groups}")
    if top_k > groups * (num_experts // options.num_groups):
        room = groups * (num_experts // options.num_groups)
        raise ValueError(f"router.top_k={top_k} exceeds the {room} experts of {groups} groups")
