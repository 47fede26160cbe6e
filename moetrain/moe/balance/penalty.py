"""What a router charges itself: of its parameters (DynMoE's "diverse and simple" loss; Guo et al. 2024), or a
mean over tokens of what its choices are like (the entropy of COMET's trees; Ibrahim et al. 2023).
"""

from __future__ import annotations

from torch import Tensor

from moetrain.moe.balance.base import Seen, register_loss
from moetrain.moe.balance.options import NoOptions
from moetrain.moe.routers import Router
from moetrain.moe.routing import RoutingRecord


def _refuses(router: Router) -> str | None:
    return None if router.has_penalty else "has no loss of its own"


@register_loss(
    "penalty",
    refuses=_refuses,
    what='what a router charges itself: DynMoE\'s "diverse and simple" loss, the entropy of `comet` and '
    "`dselect_k`, SAM's alignment",
)
def penalty(routing: RoutingRecord, seen: Seen[NoOptions]) -> Tensor:
    """This micro-batch's share, by tokens, of the router's penalty."""
    if routing.penalty is None:
        raise ValueError("this router has no penalty of its own: leave the loss penalty out")
    return routing.penalty * (routing.num_tokens.to(routing.penalty.dtype) / seen.num_tokens)
