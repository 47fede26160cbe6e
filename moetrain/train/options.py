"""The roots of ``moetrain train`` and ``moetrain generate``, and the sections of the training loop."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from moetrain.bounds import above, at_least, within
from moetrain.checkpoint.options import CheckpointConfig
from moetrain.data.options import DataConfig
from moetrain.missing import MISSING
from moetrain.models.options import ModelConfig
from moetrain.moe.balance.settings import BalanceConfig
from moetrain.moe.options import ExpertsConfig, RouterConfig
from moetrain.parallel.options import ParallelConfig
from moetrain.train.alarms.options import AlarmsConfig
from moetrain.train.future_options import FutureLossConfig
from moetrain.train.log.options import TrackerConfig
from moetrain.train.optim.options import OptimConfig, ScheduleConfig

_INT32 = 2**31 - 1
_NO_STEPS = "train.eval_first=true evaluates before the first, moetrain eval without any"


class Precision(Enum):
    """``bf16``: weights are gathered and used, products and activations computed in bf16; weights, sums of
    gradients and optimizer state kept, and norms, routers, softmax and losses computed in fp32.
    """

    fp32 = "fp32"
    bf16 = "bf16"
    fp64 = "fp64"


class Residual(Enum):
    """The stream that blocks add to: in the precision of their activations, or in fp32 under bf16."""

    same = "same"
    fp32 = "fp32"


class OnNonFinite(Enum):
    """What to do with a step whose loss or gradient norm is not finite, or spikes."""

    stop = "stop"
    skip = "skip"
    rollback = "rollback"


@dataclass(frozen=True)
class EngineConfig:
    name: str = "native"


@dataclass(frozen=True)
class RunConfig:
    """``dir`` wins, then ``root/name``, then ``root/<time, by rank 0>``; a sweep adds its job number."""

    root: str = "runs"
    name: Optional[str] = None
    dir: Optional[str] = None


@dataclass(frozen=True)
class LoopConfig:
    """The ``train`` section. ``micro_batch_size`` is in sequences per rank, at most."""

    task: str = "next_token"  # what the loss is of; a plug-in may register another
    future: FutureLossConfig = field(default_factory=FutureLossConfig)  # of model.future's layers
    steps: int = field(default=400, metadata=at_least(1, why=_NO_STEPS))
    seed: int = field(default=0, metadata=at_least(0))
    deterministic: bool = False
    # CPU threads per rank; null: OMP_NUM_THREADS, else cores / local ranks
    threads: Optional[int] = field(default=None, metadata=at_least(1, 4096))
    device: str = "auto"  # auto | cpu | cuda
    micro_batch_size: int = field(default=8, metadata=at_least(1, _INT32))
    global_batch_tokens: int = field(default=8192, metadata=at_least(1, _INT32))
    precision: Precision = Precision.fp32
    residual: Residual = Residual.same
    recompute: bool = False
    compile: bool = False
    eval_every: int = field(default=100, metadata=at_least(0))  # steps; 0: only at the end
    eval_first: bool = False  # before the first step, too
    # sequences; null: the whole held-out split
    eval_samples: Optional[int] = field(default=None, metadata=at_least(1))
    on_nonfinite: OnNonFinite = OnNonFinite.stop
    # a loss this many times its running mean counts as non-finite
    spike_factor: Optional[float] = field(default=None, metadata=above(1, "it multiplies the running mean"))
    sample_prompt: str = "def "
    sample_tokens: int = field(default=96, metadata=at_least(0, _INT32))


@dataclass(frozen=True)
class ReplayConfig:
    """Routing replay: folders of records, one to write and one to force (``train/replay.py``)."""

    record: Optional[str] = None
    force: Optional[str] = None


@dataclass(frozen=True)
class CompareConfig:
    """Train several variants of one config, each over all seeds, as a resumable queue of runs.

    Without arms there is no comparison: one run.
    """

    arms: dict[str, list[str]] = field(default_factory=dict)  # name -> overrides
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])


@dataclass(frozen=True)
class TrainConfig:
    """The root of ``moetrain train``."""

    model: ModelConfig = MISSING
    router: RouterConfig = MISSING
    balance: BalanceConfig = MISSING
    experts: ExpertsConfig = MISSING
    data: DataConfig = MISSING
    optim: OptimConfig = MISSING
    schedule: ScheduleConfig = MISSING
    parallel: ParallelConfig = MISSING
    engine: EngineConfig = MISSING
    tracker: TrackerConfig = MISSING
    train: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    init_from: Optional[str] = None  # the model to start from: a run, converted or Hugging Face folder
    init_optimizer: bool = False  # take the optimizer's state from there too
    resume: str = "auto"  # auto | none | a checkpoint's path
    resume_changes: list[str] = field(default_factory=list)  # keys that may differ then; docs/resume.md
    plugins: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class GenerateConfig:
    """The root of ``moetrain generate``. ``temperature`` 0 is greedy."""

    checkpoint: str = MISSING  # a run folder (its newest checkpoint) or one checkpoint
    prompt: Optional[str] = None
    prompt_file: Optional[str] = None
    max_new_tokens: int = field(default=128, metadata=at_least(1, _INT32))
    temperature: float = field(default=0.8, metadata=at_least(0))
    top_k: Optional[int] = field(default=None, metadata=at_least(1))
    top_p: Optional[float] = field(default=None, metadata=within(0, 1, open_low=True))
    seed: int = field(default=0, metadata=at_least(0))
    record: Optional[str] = None  # a folder for the experts that each token takes
    device: str = "auto"
    precision: Precision = Precision.fp32
    plugins: list[str] = field(default_factory=list)  # the packages that a run's own router needs
