"""The ``checkpoint`` section of the configuration."""

from dataclasses import dataclass, field

from moetrain.bounds import at_least


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = field(default=100, metadata=at_least(0))  # steps; 0: only the final one
    keep_last: int = field(default=3, metadata=at_least(1))
    async_save: bool = False
