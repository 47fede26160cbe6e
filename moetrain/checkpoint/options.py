"""The ``checkpoint`` section of the configuration."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 100  # steps; 0: only the final one
    keep_last: int = 3
    async_save: bool = False
