"""The ``parallel`` section of the configuration: how a model lies over ranks."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from moetrain.bounds import at_least, within

_RANKS = at_least(1, 2**24)
_WEEK = 7 * 86400


class ExpertDispatch(Enum):
    """How rows reach experts on other ranks; docs/dispatchers.md.

    ``all_to_all``: one row an assignment, straight; ``hierarchical``: one row a node, which spreads it and
    may sum what goes back; ``all_gather``: every token to every rank of a small group.
    """

    all_to_all = "all_to_all"
    hierarchical = "hierarchical"
    all_gather = "all_gather"


@dataclass(frozen=True)
class ParallelConfig:
    """world = dp_replicate * dp_shard; ep borrows data-parallel ranks.

    ``elastic``: sizes that do not fit the ranks become smaller ones that do, instead of being refused.
    """

    dp_replicate: int = field(default=1, metadata=_RANKS)
    dp_shard: Optional[int] = field(default=None, metadata=_RANKS)  # null: fills the world
    ep: int = field(default=1, metadata=_RANKS)
    elastic: bool = False
    dispatcher: ExpertDispatch = ExpertDispatch.all_to_all
    # consecutive ranks; null: LOCAL_WORLD_SIZE
    ranks_per_node: Optional[int] = field(default=None, metadata=_RANKS)
    node_sums: bool = True  # hierarchical only: a node's rows of a token are summed there
    # all_to_all only: chunks of experts, of which one computes while the next travels
    overlap: int = field(default=1, metadata=_RANKS)
    # seconds that a rank waits in one collective before the run ends with a report
    timeout: float = field(default=600.0, metadata=within(0, _WEEK, open_low=True))
