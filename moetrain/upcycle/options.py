"""What every upcycling method shares: plain frozen options, so that nothing here needs a config library."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from moetrain.bounds import above


class RouterStart(Enum):
    """The router's first rows. ``normal``: drawn with ``router_std``.

    ``zeros``: every weight the same; only where top_k is num_experts, since ties would send every token to
    the first experts. ``centroids``: balanced clusters of the layer's calibration inputs, each row the
    centroid less the mean input, as long as a drawn row is expected to be.
    """

    normal = "normal"
    zeros = "zeros"
    centroids = "centroids"


@dataclass(frozen=True)
class MethodOptions:
    """``name`` is the method's key in METHODS.

    ``carry_optimizer``: the optimizer's state goes where the weights go; what is new starts from zero.
    """

    name: str
    router_start: RouterStart = RouterStart.normal
    # null: 0.5 / sqrt(d_model), a linear router's own
    router_std: Optional[float] = field(default=None, metadata=above(0))
    carry_optimizer: bool = False
