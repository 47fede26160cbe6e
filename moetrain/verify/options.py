"""The root of ``moetrain verify``."""

from dataclasses import dataclass, field
from typing import Optional

from moetrain.bounds import at_least
from moetrain.train.options import TrainConfig


@dataclass(frozen=True)
class VerifyOptions:
    """``world``: the ranks of the run to come; null: the fewest that ``parallel`` allows, two at least."""

    world: Optional[int] = field(default=None, metadata=at_least(1, 2**24))
    # processes that the proof may take; a larger layout is proved on a smaller one
    ranks: int = field(default=8, metadata=at_least(2, 2**24))


@dataclass(frozen=True)
class VerifyConfig(TrainConfig):
    """The root of ``moetrain verify``: what ``moetrain train`` takes, and how to prove it."""

    verify: VerifyOptions = field(default_factory=VerifyOptions)
