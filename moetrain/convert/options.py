"""The roots of the commands that turn one checkpoint into another."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from moetrain.bounds import above, at_least
from moetrain.missing import MISSING
from moetrain.train.options import TrainConfig
from moetrain.upcycle.options import MethodOptions


class ExportFormat(Enum):
    hf = "hf"


class StoredDtype(Enum):
    """``keep``: as it is stored."""

    keep = "keep"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class AdapterFormat(Enum):
    """Of low-rank products without their matrices. ``peft``: what the package peft loads."""

    none = "none"
    peft = "peft"


@dataclass(frozen=True)
class ConvertConfig:
    """The root of ``moetrain convert``."""

    source: str = MISSING  # a Hugging Face folder, or a GGUF file
    target: str = MISSING  # the folder to make
    tokenizer: Optional[str] = None  # a tokenizer.json or its folder; null: the source's
    plugins: list[str] = field(default_factory=list)  # the packages that register its family


@dataclass(frozen=True)
class ExportConfig:
    """The root of ``moetrain export``."""

    checkpoint: str = MISSING  # a run folder (its newest checkpoint), one checkpoint, or a converted folder
    target: str = MISSING  # the folder to make
    format: ExportFormat = ExportFormat.hf
    family: str = "auto"  # auto: one that expresses the model exactly
    dtype: StoredDtype = StoredDtype.keep
    merge: bool = False  # write each matrix with its low-rank product added
    adapters: AdapterFormat = AdapterFormat.none  # write the low-rank products alone
    max_shard_gb: float = field(default=5.0, metadata=above(0))  # of one safetensors file, in 1e9 bytes
    plugins: list[str] = field(default_factory=list)  # the packages of a run's own router or family


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
    proof_tokens: int = field(default=512, metadata=at_least(1))
    calibration_tokens: int = field(default=4096, metadata=at_least(1))
