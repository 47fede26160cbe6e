"""phi-balancing: a convex potential of the population's routing distribution, by its dual variable.

Shapes: T tokens, E experts of the layer.

The loss is ``sum_e dphi(m)_e P_e``: P are the mean scores of the step's tokens, each token's normalised
to sum 1, and m the estimate of their mean over all text that the controller ``phi`` keeps. With the
conjugate of a convex phi, ``min phi(E[p]) = min max_y <y, E[p]> - phi*(y)``; a step of mirror descent on
y, with the divergence of phi*, is an exponential mean m of p in y = dphi(m). The price y has no gradient,
so contributions of micro-batches and ranks add up.

Source: Chen et al. 2026, arXiv:2605.15403. Written from its abstract's derivation; neither the body nor code
of the authors was read.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from moetrain.moe.balance.base import Seen, probabilities, register_loss
from moetrain.moe.routing import RoutingRecord

POPULATION = "phi"  # the signal: mean normalised scores [E], which sum to 1
_LEAST = 1e-12


class Potential(Enum):
    """phi of a distribution p, up to what has no effect on a gradient along the simplex.

    ``negative_entropy``: sum p log(E p), whose price is log(E m), 0 at balance; ``euclidean``: E |p|^2 / 2,
    whose price is E m, 1 at balance.
    """

    negative_entropy = "negative_entropy"
    euclidean = "euclidean"

    def price(self, mean_E: Tensor) -> Tensor:
        """The price of each expert, [E]."""
        scaled_E = mean_E * mean_E.shape[0]
        if self is Potential.euclidean:
            return scaled_E
        return torch.log(scaled_E.clamp(min=_LEAST))


@dataclass(frozen=True)
class PhiOptions:
    potential: Potential = Potential.negative_entropy


@register_loss(
    "phi",
    options=PhiOptions,
    at_balance="0; 1 if euclidean",
    what="phi-balancing: mean scores at prices of the population's load, which the controller `phi` follows",
)
def phi(routing: RoutingRecord, seen: Seen[PhiOptions]) -> Tensor:
    if POPULATION not in seen.signals:
        raise ValueError(f"the loss phi needs {POPULATION}, which no controller gives for this layer")
    p_TE = probabilities(routing)
    price_E = seen.options.potential.price(seen.signals[POPULATION].to(p_TE.device, torch.float64))
    return (p_TE.sum(0) * price_E.to(p_TE.dtype)).sum() / seen.num_tokens
