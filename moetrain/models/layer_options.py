"""Sections of ``model`` that one kind of feed-forward layer reads, named by ``model.feed_forward``."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from moetrain.bounds import at_least, within


@dataclass(frozen=True)
class ProductKeysConfig:
    """Of ``peer`` and ``pkm``: a layer looks up ``top_k`` of ``model.num_experts`` rows for each head."""

    heads: int = field(default=8, metadata=at_least(1, 2**16))
    top_k: int = field(default=16, metadata=at_least(1, 2**16))
    d_query: int = field(default=128, metadata=at_least(2, 2**20))  # of one head; a sub-key is half as wide
    # of the running statistics by which queries are batch-normalised; null: they are not
    norm_momentum: Optional[float] = field(default=0.1, metadata=within(0, 1, open_low=True))


class Decomposition(Enum):
    """Of an expert (i, j): ``horizontal``: row i in, row j out; ``vertical``: either half of its hidden units
    and of its output by i and by j."""

    horizontal = "horizontal"
    vertical = "vertical"


@dataclass(frozen=True)
class MonetConfig:
    """Of ``monet``: ``model.num_experts`` = n^2 experts of ``model.d_ff_expert`` hidden units are all pairs of
    n and n parts."""

    decompose: Decomposition = Decomposition.vertical
    heads: int = field(default=8, metadata=at_least(1, 2**16))
    top_k: int = field(default=32, metadata=at_least(1, 2**16))  # of n, about so many; the best one always
    share: int = field(default=4, metadata=at_least(1))  # consecutive MoE layers have one router
    # of the running statistics by which scores are batch-normalised to choose
    norm_momentum: float = field(default=0.1, metadata=within(0, 1, open_low=True))


# section of ``model`` -> the layers that read it
READ_BY = {"product_keys": ("peer", "pkm"), "monet": ("monet",)}
