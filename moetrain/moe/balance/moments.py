"""Balance losses that are functions F of a mean over tokens: importance, load, entropy, mutual information.

Shapes: T tokens, B sequences, E experts.

With m the mean over tokens of a vector v_t, the loss is F(m). F is not linear, so a mean over what one rank
or micro-batch holds is another loss. ``sequence``: F of each sequence's mean, weighted by its tokens.
``global_batch``: F of the whole step's mean M, counted ahead; each part of the batch contributes the
linearisation ``F'(M) . (sum of its v_t) / T`` (plus a constant for the value), and the parts add up to F(M)
and its exact gradient. ``micro``: F of the micro-batch's mean.

Sources: Shazeer et al. 2017 (importance, load: CV^2); Csordas et al. 2023 (entropy); Shen et al. 2023,
ModuleFormer (mutual information).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moetrain.moe.routing import Routing


def _cv_squared(m_XE: Tensor) -> Tensor:
    """Unbiased variance over squared mean, [X]; 0 for one expert."""
    if m_XE.shape[-1] == 1:
        return m_XE.sum(-1) * 0
    value_X: Tensor = m_XE.var(-1) / (m_XE.mean(-1).square() + 1e-10)
    return value_X


def _negative_entropy(m_XE: Tensor) -> Tensor:
    value_X: Tensor = torch.special.xlogy(m_XE, m_XE.clamp(min=torch.finfo(m_XE.dtype).tiny)).sum(-1)
    return value_X


MOMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "importance": _cv_squared,
    "load": _cv_squared,
    "entropy": _negative_entropy,
    "mi": _negative_entropy,
}


def moment_BE(routing: Routing, name: str, p_TE: Tensor) -> Tensor:
    """Sums over each sequence's valid tokens of the vector that ``name`` takes the mean of, differentiable.

    importance: combine weights; load: the router's probability of choosing, or the choices where it has no
    noise; entropy, mi: ``p_TE``, the scores normalised to sum 1 and zero where padded.
    """
    batch, num_experts = routing.demand_BE.shape
    if name == "importance":
        seq = p_TE.shape[0] // max(batch, 1)
        cell_N = routing.token_ids_N // max(seq, 1) * num_experts + routing.expert_ids_N()
        sums = routing.weights_N.new_zeros(batch * num_experts).index_add(0, cell_N, routing.weights_N)
        return sums.view(batch, num_experts)
    if name == "load":
        if routing.load_TE is None:
            return routing.demand_BE.to(p_TE.dtype)
        p_TE = routing.load_TE
        p_TE = p_TE if routing.valid_T is None else p_TE * routing.valid_T[:, None]
    return p_TE.reshape(batch, p_TE.shape[0] // max(batch, 1), num_experts).sum(1)


def moment_loss(
    routing: Routing, name: str, scope: str, p_TE: Tensor, num_tokens: float, moment_E: Tensor | None
) -> Tensor:
    """This micro-batch's contribution, a scalar without coefficient.

    ``num_tokens`` of the whole step; ``moment_E`` its sums of :func:`moment_BE`, for ``global_batch`` only.
    """
    value = MOMENTS[name]
    sums_BE = moment_BE(routing, name, p_TE)
    tokens_B = routing.num_tokens_B.to(sums_BE.dtype)
    if scope == "micro":
        sums_BE, tokens_B = sums_BE.sum(0, keepdim=True), tokens_B.sum(0, keepdim=True)
    if scope == "global_batch":
        if moment_E is None:
            raise ValueError("the global_batch scope needs the step's counts in totals")
        total = _linearised(value, sums_BE.sum(0), tokens_B.sum(), moment_E, num_tokens)
    else:
        total = (value(sums_BE / tokens_B.clamp(min=1)[:, None]) * tokens_B).sum() / num_tokens
    if name == "mi":  # - (H(mean p) - mean H(p))
        total = total - _negative_entropy(p_TE).sum() / num_tokens
    return total


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
