"""A plug-in loss that counts ahead: ``plugins=[own_loss]``, ``balance.losses=[{name: overload}]``.

Shapes: T tokens, E experts of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from moetrain.bounds import at_least
from moetrain.moe import Routing
from moetrain.moe.balance import Seen, probabilities, register_loss


@dataclass(frozen=True)
class OverloadOptions:
    # how far above the mean load an expert may be, as a share of it
    slack: float = field(default=0.0, metadata=at_least(0))


def demand_E(routing: Routing, options: OverloadOptions) -> Tensor:
    return routing.demand_E


@register_loss("overload", options=OverloadOptions, scopes=("global_batch",), ahead=demand_E, at_balance="0")
def overload(routing: Routing, seen: Seen[OverloadOptions]) -> Tensor:
    """What tokens give to experts above the step's mean load, by how far they are above it."""
    load_E = seen.counted().double()
    above_E = (load_E / load_E.mean().clamp(min=1) - 1 - seen.options.slack).clamp(min=0)
    p_TE = probabilities(routing)
    return (p_TE * above_E.to(p_TE.dtype)).sum() / seen.num_tokens
