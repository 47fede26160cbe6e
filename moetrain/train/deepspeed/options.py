"""The ``engine`` section of ``engine=deepspeed``."""

from dataclasses import dataclass, field
from typing import Optional

from moetrain.bounds import within
from moetrain.train.options import EngineConfig


@dataclass(frozen=True)
class DeepSpeedConfig(EngineConfig):
    """``zero_stage`` 1 cuts optimizer state over the ranks, 2 gradients too, 3 weights too.

    ``config``: a JSON file.
    """

    name: str = "deepspeed"
    zero_stage: int = field(default=1, metadata=within(0, 3))
    offload: bool = False  # ZeRO-Offload: optimizer state and the update on the CPU
    config: Optional[str] = None  # merged with what moetrain decides; docs/deepspeed.md
