"""Losses of the choices themselves, which a router makes with a gradient: DynMoE's, as released.

Guo et al. 2024 (arXiv:2405.14297) charge for the router's own parameters (the loss ``penalty``); of the two
releases the one for DeepSpeed adds both losses here to it, at equal weight.

Shapes: T tokens, E experts of the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.balance.base import Seen, register_loss
from moetrain.moe.balance.options import NoOptions
from moetrain.moe.routers import Router
from moetrain.moe.routing import RoutingRecord


def _refuses(router: Router) -> str | None:
    return None if router.has_choices else "makes no choices with a gradient"


def _choices(routing: RoutingRecord) -> Tensor:
    """[T, E]: 1 or 0, zero where padded."""
    choices_TE = routing.choices_TE
    if choices_TE is None:
        raise ValueError("this router makes no choices with a gradient: leave the losses of choices out")
    return choices_TE if routing.valid_T is None else choices_TE * routing.valid_T[:, None]


def _counts_ahead(routing: RoutingRecord, options: NoOptions) -> Tensor:
    """[E + 1]: how often each expert is chosen, and the tokens that choose any."""
    chosen_TE = _choices(routing).detach() > 0
    return torch.cat([chosen_TE.sum(0), chosen_TE.any(-1).sum()[None]])


@register_loss(
    "choice_balance",
    refuses=_refuses,
    ahead=_counts_ahead,
    at_balance="choices a token",
    what="DynMoE's for DeepSpeed: E sum_e f_e P_e over tokens that choose any, P of even shares",
)
def choice_balance(routing: RoutingRecord, seen: Seen[NoOptions]) -> Tensor:
    """``E sum_e f_e P_e``, both means over the step's tokens that choose an expert: f of choices, a count
    without a gradient, P of choices over their number."""
    choices_TE, counted = _choices(routing), seen.counted().to(torch.float64)
    tokens = counted[-1].clamp(min=1)
    share_E = (counted[:-1] / tokens).to(choices_TE.dtype)
    number_T1 = choices_TE.sum(-1, keepdim=True)
    none_T1 = number_T1.detach() == 0
    parts_TE = choices_TE / torch.where(none_T1, 1, number_T1)
    return (parts_TE @ share_E).sum() * (routing.num_experts / tokens.to(choices_TE.dtype))


@register_loss(
    "choice_share",
    refuses=_refuses,
    what="DynMoE's for DeepSpeed, and its sparse loss for Tutel: the share of all pairs that is chosen",
)
def choice_share(routing: RoutingRecord, seen: Seen[NoOptions]) -> Tensor:
    """Choices over tokens and experts, those asleep included."""
    return _choices(routing).sum() / (routing.num_experts * seen.num_tokens)
