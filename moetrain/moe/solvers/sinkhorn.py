"""Sinkhorn's balanced plan in the log domain, to a tolerance (Sinkhorn 1967; Clark et al. 2022, S-BASE).

Shapes: G groups, L tokens of a group with padding, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.errors import TrainingError


class NotConvergedError(TrainingError):
    """The marginals did not reach the tolerance within the limit of iterations."""


def sinkhorn_plan(
    logits_GLE: Tensor, valid_GL: Tensor, tolerance: float, max_iterations: int = 100_000
) -> Tensor:
    """log plan [G, L, E]: rows sum to 1 / tokens, columns to 1 / E; -inf for padding.

    A group iterates until every column's sum is within ``tolerance`` of 1 / E, relatively, whatever groups
    are beside it; rows are exact. -inf logits are read as the lowest finite one, so that a plan exists. A
    group with NaN or +inf has no plan: its tokens get NaN, the other groups are solved. Raises
    NotConvergedError at the limit.
    """
    num_experts = logits_GLE.shape[-1]
    broken_GL = (logits_GLE.isnan() | logits_GLE.isposinf()).any(-1) & valid_GL
    broken_GL = broken_GL.any(-1, keepdim=True) & valid_GL
    valid_GL = valid_GL & ~broken_GL
    tokens_G1 = valid_GL.sum(-1, keepdim=True)
    if not logits_GLE.numel() or not int(tokens_G1.max()):
        return _without_plan(logits_GLE, broken_GL)
    wide = logits_GLE.double()
    top_GL1 = wide.amax(-1, keepdim=True)
    wide = (wide - top_GL1.where(top_GL1.isfinite(), 0.0)).clamp(min=-80.0)  # an affinity of e^-80 is none
    log_k_GLE = wide.masked_fill(~valid_GL[..., None], float("-inf"))
    log_row_GL = (-torch.log(tokens_G1.double())).expand(valid_GL.shape)
    log_row_GL = log_row_GL.where(valid_GL, float("-inf"))
    log_column = -torch.log(torch.tensor(float(num_experts), dtype=torch.float64))
    used_G1 = tokens_G1 > 0
    g_GE = torch.zeros(len(wide), num_experts, dtype=torch.float64, device=wide.device)
    for _ in range(max_iterations):
        f_GL = log_row_GL - torch.logsumexp(log_k_GLE + g_GE[:, None], -1)
        f_GL = f_GL.where(valid_GL, float("-inf"))
        sums_GE = torch.logsumexp(log_k_GLE + f_GL[..., None].where(valid_GL[..., None], 0.0), 1)
        error_GE = (sums_GE + g_GE - log_column).where(used_G1, 0.0)
        off_G1 = error_GE.expm1().abs().amax(-1, keepdim=True)
        if float(off_G1.max()) <= tolerance:
            plan = log_k_GLE + f_GL[..., None].where(valid_GL[..., None], 0.0) + g_GE[:, None]
            return plan.to(logits_GLE.dtype).masked_fill(broken_GL[..., None], float("nan"))
        # a group that is there waits for the others, or its plan would be another one beside other groups
        g_GE = (log_column - sums_GE).where(used_G1 & ~(off_G1 <= tolerance), g_GE)
    error = float(off_G1.max())
    raise NotConvergedError(
        f"Sinkhorn's column sums are still {error:.1e} off after {max_iterations} iterations, "
        f"tolerance {tolerance:.1e}: raise router.tolerance"
    )


def _without_plan(logits_GLE: Tensor, broken_GL: Tensor) -> Tensor:
    empty_GLE = torch.full_like(logits_GLE, float("-inf"))
    return empty_GLE.masked_fill(broken_GL[..., None], float("nan"))
