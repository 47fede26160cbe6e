"""The root of ``moetrain upcycle``."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from moetrain.config.schema import TrainConfig
from moetrain.upcycle.options import MethodOptions


@dataclass(frozen=True)
class UpcycleConfig(TrainConfig):
    """What ``moetrain train`` takes, of the MoE model to come, and how to make it.

    ``train.seed`` decides what is drawn. ``data`` is the text that calibration (its training side) and the
    proof (its held-out side) read.
    """

    source: str = MISSING  # a run, converted or Hugging Face folder
    target: str = MISSING  # the folder to make
    donors: list[str] = field(default_factory=list)  # method=join: further models of the source's shape
    method: MethodOptions = MISSING
    prove: bool = True  # compare the logits of source and target on held-out text
    proof_tokens: int = 512
    calibration_tokens: int = 4096
