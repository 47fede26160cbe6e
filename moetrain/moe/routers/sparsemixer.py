"""Gradient estimators for the discrete choice: SparseMixer, SparseMixer-v2 (GRIN), straight-through.

A sampled expert D gets the weight p_D; what plain backpropagation misses is how the choice itself depends on
p. The estimators add it from one or two function values, without running other experts.

Shapes: T tokens, E experts, K choices. Sources: Liu et al. 2023, arXiv:2310.00811 (midpoint rule); Liu et
al. 2024, arXiv:2409.12136 (GRIN; Heun's third-order rule, Algorithms 1 and 2); Bengio et al. 2013.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Optional

import torch
from torch import Tensor

from moetrain.moe.assign import from_token_choice
from moetrain.moe.context import RouterContext
from moetrain.moe.evaluation import Words, token_choice
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import first_max, softmax, top_ids

_GUMBEL_SALT, _COIN_SALT = 0x5A41, 0x5A42


def best_left(logits_TE: Tensor, taken_TE: Tensor) -> Tensor:
    """The best expert that is not taken, int64 [T]; one at -inf only where all others are."""
    return first_max(logits_TE.clamp(min=torch.finfo(logits_TE.dtype).min).masked_fill(taken_TE, -torch.inf))


def gumbel_draw(p_TE: Tensor, taken_TE: Tensor, noise_TE: Tensor) -> Tensor:
    """A draw by the probabilities p among the experts that are not taken, int64 [T], from uniform noise."""
    log_p_TE = p_TE.detach().log().clamp(min=torch.finfo(p_TE.dtype).min / 2)
    return best_left(log_p_TE - torch.log(-torch.log(noise_TE.to(p_TE.dtype))), taken_TE)


@dataclass(frozen=True)
class SparseMixerOptions(RouterConfig):
    name: str = "sparsemixer"
    eps: float = 0.1  # experts whose logit lies 2 eps below the best, relatively, are never drawn


@register("sparsemixer", SparseMixerOptions, "Liu et al. 2023, arXiv:2310.00811", "one expert a token")
class SparseMixerRouter(LinearRouter):
    """m = p_D, or half of it (a fair coin, where D is not the best); dm / dp_D is 2 in both cases.

    The paper's learnt output scale is left out: the experts' down projections contain it.
    """

    top_k = 1

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = self._masked_softmax(logits_TE)
        best_T = first_max(logits_TE.detach())
        if not self.training:
            return self._one(best_T, scores_TE.gather(-1, best_T[:, None]), scores_TE, logits_TE, ctx)
        noise_TE = ctx.uniform(tuple(logits_TE.shape), _GUMBEL_SALT)
        drawn_T = gumbel_draw(scores_TE, torch.zeros_like(scores_TE, dtype=torch.bool), noise_TE)
        p_T = scores_TE.gather(-1, drawn_T[:, None]).squeeze(-1)
        whole_T = (drawn_T == best_T) | (ctx.uniform((len(p_T),), _COIN_SALT) < 0.5)
        value_T = p_T.detach() * (0.5 + 0.5 * whole_T)
        return self._one(drawn_T, midpoint(p_T, value_T)[:, None], scores_TE, logits_TE, ctx)

    def _masked_softmax(self, logits_TE: Tensor) -> Tensor:
        best_T1 = logits_TE.detach().amax(-1, keepdim=True)
        scale_TE = torch.maximum(logits_TE.detach().abs(), best_T1)
        eps = self.options.eps  # type: ignore[attr-defined]
        return softmax(logits_TE.masked_fill((best_T1 - logits_TE) / scale_TE > 2 * eps, -torch.inf))

    def _one(
        self, ids_T: Tensor, weights_T1: Tensor, scores_TE: Tensor, logits_TE: Tensor, ctx: RouterContext
    ) -> Routing:
        return from_token_choice(ids_T[:, None], weights_T1, ctx, self.num_experts, scores_TE, logits_TE)


def midpoint(p_T: Tensor, value_T: Tensor) -> Tensor:
    """``value`` forward, the gradient of 2 p backward."""
    return 2 * p_T + (value_T - 2 * p_T).detach()


@dataclass(frozen=True)
class SparseMixer2Options(RouterConfig):
    name: str = "sparsemixer2"
    top_k: Optional[int] = None
    eps: float = 0.1  # experts with best - z > eps (|z| + |best|) are never drawn
    corrected: bool = False  # Algorithm 2 (v2*): the derivation without v2's error


@register("sparsemixer2", SparseMixer2Options, "Liu et al. 2024, arXiv:2409.12136", "k experts a token")
class SparseMixer2Router(LinearRouter):
    """k draws without replacement. The forward is p_D or a third of it; experts keep their unscaled gradient.

    Algorithm 1: ``y = h + sg(s h - h)``, coin 1/4. Algorithm 2: ``y = 2 h + sg(s h - 2 h)``, coin 5/8, from
    softmax(z / 2). s is 1 for the best expert or where the coin falls so, else 1/3.
    """

    top_k: int
    permutable = False  # an assignment has a scale of its own in the forward pass

    def __init__(self, d_model: int, num_experts: int, options: SparseMixer2Options) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        options = self.options
        assert isinstance(options, SparseMixer2Options)
        logits_TE = self.logits(x_TD)
        left_TE = logits_TE / 2 if options.corrected else logits_TE
        gain, coin = (2.0, 5 / 8) if options.corrected else (1.0, 1 / 4)
        taken_TE = torch.zeros_like(left_TE, dtype=torch.bool)
        ids, weights, scales = [], [], []
        for choice in range(self.top_k):
            p_TE = self._masked_softmax(left_TE)
            best_T = drawn_T = best_left(left_TE.detach(), taken_TE)
            scale_T = torch.ones_like(best_T, dtype=p_TE.dtype)
            if self.training:
                noise_TE = ctx.uniform(tuple(logits_TE.shape), _GUMBEL_SALT + 2 * choice)
                drawn_T = gumbel_draw(p_TE, taken_TE, noise_TE)
                heads_T = ctx.uniform((len(best_T),), _COIN_SALT + 2 * choice) < coin
                scale_T = scale_T.where((drawn_T == best_T) | heads_T, 1 / 3)
            ids.append(drawn_T)
            weights.append(gain * p_TE.gather(-1, drawn_T[:, None]).squeeze(-1))
            scales.append(scale_T / gain)
            left_TE = left_TE.scatter(-1, drawn_T[:, None], -torch.inf)
            taken_TE = taken_TE.scatter(-1, drawn_T[:, None], True)
        scores_TE = softmax(logits_TE)
        routing = from_token_choice(
            torch.stack(ids, -1), torch.stack(weights, -1), ctx, self.num_experts, scores_TE, logits_TE
        )
        scale_TK = torch.stack(scales, -1)
        assignment = routing.assignment
        assert assignment.choice_N is not None
        scale_N = scale_TK[assignment.token_ids_N, assignment.choice_N]
        return replace(routing, assignment=replace(assignment, forward_scale_N=scale_N))

    def _masked_softmax(self, z_TE: Tensor) -> Tensor:
        best_T1 = z_TE.detach().amax(-1, keepdim=True)
        bound_TE = self.options.eps * (z_TE.detach().abs() + best_T1.abs())  # type: ignore[attr-defined]
        far_TE = (best_T1 - z_TE.detach() > bound_TE) | z_TE.detach().isneginf()
        return softmax(z_TE.masked_fill(far_TE, -torch.inf))


@dataclass(frozen=True)
class StraightThroughOptions(RouterConfig):
    name: str = "straight_through"
    top_k: Optional[int] = None

    def evaluation_rule(self, num_experts: int) -> Words:
        return token_choice(resolve_top_k(self.top_k, num_experts), weights="equal")


@register(
    "straight_through", StraightThroughOptions, "Bengio et al. 2013, arXiv:1308.3432", "k experts a token"
)
class StraightThroughRouter(LinearRouter):
    """Weights are 1 / k forward; backward they are the experts' probabilities."""

    top_k: int
    reads_bias = True
    replays = True
    takes_best = True

    def __init__(self, d_model: int, num_experts: int, options: StraightThroughOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = softmax(logits_TE)
        ids_TK = ctx.forced_TK
        if ids_TK is None:
            ids_TK = top_ids(scores_TE.detach() + self.bias_E, self.top_k)
        p_TK = scores_TE.gather(-1, ids_TK)
        weights_TK = p_TK + (1 / self.top_k - p_TK).detach()
        return from_token_choice(ids_TK, weights_TK, ctx, self.num_experts, scores_TE, logits_TE)
