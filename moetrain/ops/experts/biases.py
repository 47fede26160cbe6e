"""What biases of experts add to rows, for backends that compute all experts at once.

Shapes: R rows, in B blocks of one expert each (-1 behind the last), E experts, A any width.
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_BIASES = "it adds no biases (experts.bias)"


def add_biases(out_RA: Tensor, bias_EA: Tensor, experts_B: Tensor, scale_R: Tensor | None = None) -> None:
    """Add each row's bias, times ``scale_R`` where given, in place."""
    bias_B1A = bias_EA.to(out_RA.dtype)[experts_B.clamp(min=0)][:, None]
    rows_BnA = out_RA.unflatten(0, (len(experts_B), -1))
    if scale_R is None:
        rows_BnA.add_(bias_B1A)
    else:
        rows_BnA.addcmul_(bias_B1A, scale_R.to(out_RA.dtype).view(len(experts_B), -1, 1))


def gradient_of_biases(dy_RA: Tensor, like_EA: Tensor, experts_B: Tensor) -> Tensor:
    """[E, A] in ``like_EA``'s dtype: sums of each expert's rows, in fp32 at least and always in one order."""
    wide = torch.promote_types(dy_RA.dtype, torch.float32)
    sums_BA = dy_RA.unflatten(0, (len(experts_B), -1)).sum(1, dtype=wide)
    sums_BA.masked_fill_((experts_B < 0)[:, None], 0)  # behind the last block anything may stand
    of_expert_EB = torch.arange(len(like_EA), device=experts_B.device)[:, None] == experts_B
    dbias_EA: Tensor = of_expert_EB.to(wide) @ sums_BA
    return dbias_EA.to(like_EA.dtype)


def times_biases(dy_RA: Tensor, bias_EA: Tensor, experts_B: Tensor, dtype: torch.dtype) -> Tensor:
    """[R] in ``dtype``: the inner product of each row and its bias."""
    bias_BA1 = bias_EA.to(dtype)[experts_B.clamp(min=0)][..., None]
    dots_Bn1: Tensor = dy_RA.to(dtype).unflatten(0, (len(experts_B), -1)) @ bias_BA1
    return dots_Bn1.flatten()
