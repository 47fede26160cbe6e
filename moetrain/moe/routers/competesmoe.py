"""CompeteSMoE: now and then experts compete for tokens by their outputs, and the router learns who wins.

competesmoe     Nguyen et al. 2025, arXiv:2505.13380, by its released code.
competesmoe_v1  Pham et al. 2024, arXiv:2402.02526, by its released code, which its authors call faulty.

Shapes: T tokens, D model, E experts, K top-k, R rows of outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.bounds import at_least, within
from moetrain.moe.assign import from_token_choice
from moetrain.moe.combine import Combine
from moetrain.moe.competition import competes
from moetrain.moe.context import RouterContext
from moetrain.moe.evaluation import Words, token_choice
from moetrain.moe.options import RouterConfig
from moetrain.moe.questions import Question
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.smooth_choice import valid_mean
from moetrain.moe.topk_ops import softmax, top_ids


@dataclass(frozen=True)
class CompetitionOptions(RouterConfig):
    """What both versions share."""

    top_k: Optional[int] = None  # null: 2, or 1 where there is one expert
    rate: float = field(default=0.05, metadata=within(0, 1))  # the share of steps in which a layer competes
    warmup_steps: int = field(default=0, metadata=at_least(0))  # before the first of them

    def combine(self, num_experts: int) -> Combine:
        k = resolve_top_k(self.top_k, num_experts)
        return Combine.of_softmax(k, num_experts, self.drops, renormalized=True)


@dataclass(frozen=True)
class CompeteSMoEOptions(CompetitionOptions):
    name: str = "competesmoe"
    # layers that compete in one step; null: no bound
    most_layers: Optional[int] = field(default=3, metadata=at_least(1))
    # in the penalty: of the distance at the winners, and of their outputs' mean cosine
    winners_coef: float = field(default=0.1, metadata=at_least(0))
    diversity_coef: float = field(default=1.0, metadata=at_least(0))

    def evaluation_rule(self, num_experts: int) -> Words:
        return _rule(self, num_experts)


@dataclass(frozen=True)
class CompeteSMoEV1Options(CompetitionOptions):
    name: str = "competesmoe_v1"
    rate: float = field(default=0.03, metadata=within(0, 1))

    def evaluation_rule(self, num_experts: int) -> Words:
        return _rule(self, num_experts)


class CompetitionRouter(LinearRouter):
    """The k best of softmax(z), weights of sum 1; in a competition the k experts of the highest affinity,
    a number of each expert's output, which is the context's ``responses_TE``.

    Competitions are of training, by the schedule of ``competition.py``; a router without a layer around it
    has no outputs to ask, and routes. Scores are softmax(z), and softmax(affinity) in a competition, with its
    gradient into the experts; logits are always z. The Routing's penalty is the distance of softmax(z) from
    the competition's outcome, and 0 where there is none.
    """

    options: CompetitionOptions
    top_k: int
    reads_outputs = True
    has_penalty = True
    permutable = False  # the router's k-th output stands for the k-th expert's outputs
    most_layers: int | None = None

    def __init__(self, d_model: int, num_experts: int, options: CompetitionOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)

    @staticmethod
    def affinity(out_RD: Tensor) -> Tensor:
        """[R]: what an expert's outputs say of its claim."""
        raise NotImplementedError

    def outcome(self, affinity_TE: Tensor, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The winners [T, K], their weights [T, K], and how far the router's forecast is off [T]."""
        raise NotImplementedError

    def asks(self, ctx: RouterContext) -> Question | None:
        options = self.options
        if not self.training or not competes(ctx, options.rate, self.most_layers, options.warmup_steps):
            return None
        return Question(self.affinity, rows_per_token=self.top_k)

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        if ctx.responses_TE is None:
            scores_TE = softmax(logits_TE)
            ids_TK = top_ids(scores_TE, self.top_k)
            weights_TK = softmax(logits_TE.gather(-1, ids_TK))
            penalty = logits_TE.new_zeros(())
        else:
            affinity_TE = ctx.responses_TE.to(logits_TE.dtype)
            scores_TE = softmax(affinity_TE)
            ids_TK, weights_TK, distance_T = self.outcome(affinity_TE, logits_TE)
            penalty = valid_mean(distance_T, ctx)
        routing = from_token_choice(ids_TK, weights_TK, ctx, self.num_experts, scores_TE, logits_TE)
        return replace(routing, penalty=penalty)


@register("competesmoe", CompeteSMoEOptions, "Nguyen et al. 2025, arXiv:2505.13380", "k experts a token")
class CompeteSMoERouter(CompetitionRouter):
    """The affinity is the mean of softplus(output), and a winner's weight its share of the winners' sum.

    The penalty is the mean squared difference of softmax(z) and softmax(affinity), which is given, over the
    experts, plus ``winners_coef`` times that over the winners, plus ``diversity_coef`` times the mean, over
    all K x K pairs of winners, of the cosine of their outputs, 0 of a winner with itself.
    """

    options: CompeteSMoEOptions

    def __init__(self, d_model: int, num_experts: int, options: CompeteSMoEOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.most_layers = options.most_layers

    @staticmethod
    def affinity(out_RD: Tensor) -> Tensor:
        return F.softplus(out_RD).mean(-1)

    def asks(self, ctx: RouterContext) -> Question | None:
        question = super().asks(ctx)
        return None if question is None else replace(question, directions=self.options.diversity_coef > 0)

    def outcome(self, affinity_TE: Tensor, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ids_TK = top_ids(affinity_TE.detach(), self.top_k)
        won_TK = affinity_TE.gather(-1, ids_TK)
        # without a token, or of padding, nothing answers
        weights_TK = won_TK / won_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(won_TK.dtype).tiny)
        off_TE = (softmax(logits_TE) - softmax(affinity_TE.detach())).square()
        distance_T = off_TE.mean(-1) + self.options.winners_coef * off_TE.gather(-1, ids_TK).mean(-1)
        return ids_TK, weights_TK, distance_T

    def judged(
        self, routing: Routing, directions_TD: Tensor, present_T: Tensor, ctx: RouterContext
    ) -> Routing:
        assert routing.penalty is not None
        wide_TD = directions_TD.to(routing.penalty.dtype)
        # |sum of unit vectors|^2 is their number and twice the cosines of all pairs
        cosines_T = (wide_TD.square().sum(-1) - present_T.to(wide_TD.dtype)) / self.top_k**2
        diversity = self.options.diversity_coef * valid_mean(cosines_T, ctx)
        return replace(routing, penalty=routing.penalty + diversity)


@register("competesmoe_v1", CompeteSMoEV1Options, "Pham et al. 2024, arXiv:2402.02526", "k experts a token")
class CompeteSMoEV1Router(CompetitionRouter):
    """The affinity is the output's norm, and the winners' weights the softmax of theirs.

    The penalty is the mean squared difference of softmax(z) and the winners' weights, 0 elsewhere, over the
    experts, with its gradient into both.
    """

    options: CompeteSMoEV1Options

    @staticmethod
    def affinity(out_RD: Tensor) -> Tensor:
        norm_R: Tensor = torch.linalg.vector_norm(out_RD, dim=-1)
        return norm_R

    def outcome(self, affinity_TE: Tensor, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ids_TK = top_ids(affinity_TE.detach(), self.top_k)
        weights_TK = softmax(affinity_TE.gather(-1, ids_TK))
        wanted_TE = torch.zeros_like(logits_TE).scatter(-1, ids_TK, weights_TK)
        return ids_TK, weights_TK, (softmax(logits_TE) - wanted_TE).square().mean(-1)


def _rule(options: CompetitionOptions, num_experts: int) -> Words:
    top_k = resolve_top_k(options.top_k, num_experts)
    return token_choice(top_k, weights="softmax", select="scores")
