"""What gates of smooth binary choices share: the smooth-step function, and the entropy of their choices.

Shapes: T tokens, K selectors or trees, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.context import RouterContext

_EPS = 1e-6  # inside the logarithm, as in the released code of both gates


def smooth_step(t: Tensor, gamma: float) -> Tensor:
    """0 up to -gamma / 2, 1 from gamma / 2 on, a cubic of continuous slope between (Hazimeh et al. 2020).

    Of any shape. The slope at 0 is 3 / (2 gamma); outside it is 0 to the bit, and so is the value.
    """
    u = (t / gamma).clamp(-0.5, 0.5)
    return 0.5 + u * (1.5 - 2 * u * u)


def entropy_of_choices(p_TKE: Tensor, ctx: RouterContext) -> Tensor:
    """The mean over valid tokens of ``sum_ke -p log(p + 1e-6)``, a scalar; 0 where there is no token."""
    return valid_mean(-(p_TKE * torch.log(p_TKE + _EPS)).sum((-2, -1)), ctx)


def valid_mean(value_T: Tensor, ctx: RouterContext) -> Tensor:
    """The mean over valid tokens, a scalar; 0 where there is none. What stands in the padding has no say."""
    if ctx.valid_T is None:
        return value_T.sum() / max(value_T.shape[0], 1)
    return torch.where(ctx.valid_T, value_T, 0.0).sum() / ctx.valid_T.sum().clamp(min=1)
