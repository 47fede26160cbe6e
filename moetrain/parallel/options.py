"""The ``parallel`` section of the configuration: how a model lies over ranks."""

from dataclasses import dataclass
from enum import Enum
from typing import Optional


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
    """world = dp_replicate * dp_shard; ep borrows data-parallel ranks."""

    dp_replicate: int = 1
    dp_shard: Optional[int] = None  # null: fills the world
    ep: int = 1
    dispatcher: ExpertDispatch = ExpertDispatch.all_to_all
    ranks_per_node: Optional[int] = None  # consecutive ranks; null: LOCAL_WORLD_SIZE
    node_sums: bool = True  # hierarchical only: a node's rows of a token are summed there
    overlap: int = 1  # all_to_all only: chunks of experts, of which one computes while the next travels
    timeout: float = 600.0  # seconds that a rank waits in one collective before the run ends with a report
