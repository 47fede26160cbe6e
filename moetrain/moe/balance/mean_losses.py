"""Losses F of a mean over tokens: importance, load, entropy, concentration, mutual information.

Shapes: T tokens, B sequences, E experts.

With m the mean over tokens of a vector v_t, the loss is F(m). F is not linear, so a mean over what one rank
or micro-batch holds is another loss. ``sequence``: F of each sequence's mean, weighted by its tokens.
``global_batch``: F of the whole step's mean M, counted ahead; each part of the batch contributes the
linearisation ``F'(M) . (sum of its v_t) / T`` (plus a constant for the value), and the parts add up to F(M)
and its exact gradient. ``micro``: F of the micro-batch's mean.

Sources: Shazeer et al. 2017 (importance, load: CV^2); Csordas et al. 2023 (entropy); Shen et al. 2023,
ModuleFormer (mutual information; concentration, which fine-tuning before pruning takes in its place).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.moe.balance.base import Seen, probabilities, register_loss
from moetrain.moe.balance.options import NoOptions
from moetrain.moe.routing import RoutingRecord


def _cv_squared(m_XE: Tensor) -> Tensor:
    """Unbiased variance over squared mean, [X]; 0 for one expert."""
    if m_XE.shape[-1] == 1:
        return m_XE.sum(-1) * 0
    value_X: Tensor = m_XE.var(-1) / (m_XE.mean(-1).square() + 1e-10)
    return value_X


def _negative_entropy(m_XE: Tensor) -> Tensor:
    value_X: Tensor = torch.special.xlogy(m_XE, m_XE.clamp(min=torch.finfo(m_XE.dtype).tiny)).sum(-1)
    return value_X


def _by_sequence(x_TE: Tensor, routing: RoutingRecord) -> Tensor:
    """Sums over each sequence's tokens, [B, E]."""
    batch, num_experts = routing.demand_BE.shape
    return x_TE.reshape(batch, x_TE.shape[0] // max(batch, 1), num_experts).sum(1)


def _weights_BE(routing: RoutingRecord, p_TE: Tensor) -> Tensor:
    """Combine weights."""
    return routing.weights_BE(p_TE.shape[0])


def _choices_BE(routing: RoutingRecord, p_TE: Tensor) -> Tensor:
    """The router's probability of choosing, or the choices where it has no noise."""
    if routing.load_TE is None:
        return routing.demand_BE.to(p_TE.dtype)
    load_TE = routing.load_TE
    load_TE = load_TE if routing.valid_T is None else load_TE * routing.valid_T[:, None]
    return _by_sequence(load_TE, routing)


def _scores_BE(routing: RoutingRecord, p_TE: Tensor) -> Tensor:
    """The scores normalised to sum 1 and zero where padded."""
    return _by_sequence(p_TE, routing)


@dataclass(frozen=True)
class _Moment:
    """A loss ``F(mean of v)``: sums over each sequence's valid tokens of v, differentiable, and F."""

    sums_BE: Callable[[RoutingRecord, Tensor], Tensor]
    value: Callable[[Tensor], Tensor]

    def ahead_E(self, routing: RoutingRecord, options: NoOptions) -> Tensor:
        return self.sums_BE(routing, probabilities(routing)).sum(0)

    def loss(self, routing: RoutingRecord, seen: Seen[NoOptions]) -> Tensor:
        return self.of(routing, seen, probabilities(routing))

    def of(self, routing: RoutingRecord, seen: Seen[NoOptions], p_TE: Tensor) -> Tensor:
        sums_BE = self.sums_BE(routing, p_TE)
        tokens_B = routing.num_tokens_B.to(sums_BE.dtype)
        if seen.scope == "micro":
            sums_BE, tokens_B = sums_BE.sum(0, keepdim=True), tokens_B.sum(0, keepdim=True)
        if seen.scope == "global_batch":
            moment_E = seen.counted()
            return _linearised(self.value, sums_BE.sum(0), tokens_B.sum(), moment_E, seen.num_tokens)
        means = sums_BE / tokens_B.clamp(min=1)[:, None]
        return (self.value(means) * tokens_B).sum() / seen.num_tokens


def _entropy(m_XE: Tensor) -> Tensor:
    return -_negative_entropy(m_XE)


_SCORES = _Moment(_scores_BE, _negative_entropy)


def _mutual_information(routing: RoutingRecord, seen: Seen[NoOptions]) -> Tensor:
    """- (H(mean p) - mean H(p))."""
    p_TE = probabilities(routing)
    return _SCORES.of(routing, seen, p_TE) - _negative_entropy(p_TE).sum() / seen.num_tokens


def _register(
    name: str,
    moment: _Moment,
    at_balance: str,
    what: str,
    loss: Callable[[RoutingRecord, Seen[NoOptions]], Tensor] | None = None,
) -> None:
    scopes = ("sequence", "global_batch", "micro")
    register = register_loss(name, scopes=scopes, ahead=moment.ahead_E, at_balance=at_balance, what=what)
    register(loss or moment.loss)


_register("importance", _Moment(_weights_BE, _cv_squared), "0", "squared variation of the weights' sums")
_register(
    "load", _Moment(_choices_BE, _cv_squared), "0", "squared variation of the probabilities of being chosen"
)
_register("entropy", _SCORES, "-log E", "minus the entropy of the mean scores")
_register("concentration", _Moment(_scores_BE, _entropy), "log E", "the entropy of the mean scores")
_register("mi", _SCORES, "-log E", "minus the mutual information of tokens and experts", _mutual_information)


def _linearised(
    value: Callable[[Tensor], Tensor], sums_E: Tensor, tokens: Tensor, moment_E: Tensor, num_tokens: float
) -> Tensor:
    with torch.enable_grad():
        mean_1E = (moment_E.to(sums_E) / num_tokens)[None].detach().requires_grad_()
        at_mean = value(mean_1E).sum()
        (slope_1E,) = torch.autograd.grad(at_mean, mean_1E)
    slope_E = slope_1E[0]
    constant = at_mean.detach() - (slope_E * mean_1E.detach()[0]).sum()
    return (slope_E * sums_E).sum() / num_tokens + constant * tokens / num_tokens
