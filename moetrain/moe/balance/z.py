"""The z-loss, which keeps a router's logits small (Zoph et al. 2022, eq. 5). Shapes: T tokens, E experts."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.balance.base import Seen, register_loss, without_logits
from moetrain.moe.balance.options import NoOptions
from moetrain.moe.routing import RoutingRecord


@register_loss("z", refuses=without_logits, what="mean squared logsumexp of the logits")
def z(routing: RoutingRecord, seen: Seen[NoOptions]) -> Tensor:
    """This micro-batch's contribution to mean_t (logsumexp_e z_te)^2."""
    if routing.logits_TE is None:
        raise ValueError("this router returns no logits, so it has no z-loss")
    square_T = torch.logsumexp(routing.logits_TE, dim=-1).square()
    if routing.valid_T is not None:
        square_T = torch.where(routing.valid_T, square_T, 0)
    return square_T.sum() / seen.num_tokens
