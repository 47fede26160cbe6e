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
    """Of an expert (i, j): ``horizontal``: part i in, part j out; ``vertical``: one half of its hidden
    units and of its output by i, the other by j."""

    horizontal = "horizontal"
    vertical = "vertical"


@dataclass(frozen=True)
class MonetConfig:
    """Of ``monet``: ``model.num_experts`` = n^2 experts of ``model.d_ff_expert`` hidden units are all
    pairs of n and n parts."""

    decompose: Decomposition = Decomposition.vertical
    heads: int = field(default=8, metadata=at_least(1, 2**16))
    top_k: int = field(default=32, metadata=at_least(1, 2**16))  # of n, about so many; the best one always
    share: int = field(default=4, metadata=at_least(1))  # consecutive MoE layers have one router
    # of the running statistics by which scores are batch-normalised to choose
    norm_momentum: float = field(default=0.1, metadata=within(0, 1, open_low=True))


class RouteBy(Enum):
    """``previous_segment``: a run of tokens by the mean of the run before it. ``sequence``: a row by its own
    mean, which looks ahead."""

    previous_segment = "previous_segment"
    sequence = "sequence"


@dataclass(frozen=True)
class MergingConfig:
    """Of ``smear`` and ``meo``: the experts' weights are averaged once a segment."""

    route_by: RouteBy = RouteBy.previous_segment
    segment: int = field(default=256, metadata=at_least(1))  # tokens
    expert_dropout: float = field(default=0.0, metadata=within(0, 1, open_high=True))  # smear, in training
    top_k: int = field(default=2, metadata=at_least(1))  # meo: experts in a merged matrix
    # meo: a matrix's input gets a bottleneck of its width by this; null: none
    token_reduction: Optional[int] = field(default=None, metadata=at_least(1))


@dataclass(frozen=True)
class S2MoEConfig:
    """Of ``s2moe``."""

    # of the contrast between tokens and their noisy copies
    temperature: float = field(default=1.0, metadata=within(0, 100, open_low=True))


class BlockWeight(Enum):
    """``one``: a chosen block counts as a part of one network does; ``score``: as ``router`` weighs it."""

    one = "one"
    score = "score"


@dataclass(frozen=True)
class AvgKConfig:
    """Of ``avg_k``: the experts are blocks of hidden units, chosen by the means of their keys."""

    weight: BlockWeight = BlockWeight.one


# section of ``model`` -> the layers that read it
READ_BY = {
    "product_keys": ("peer", "pkm"),
    "monet": ("monet",),
    "merging": ("smear", "meo"),
    "s2moe": ("s2moe",),
    "avg_k": ("avg_k",),
}
