"""The typed configuration: one frozen dataclass per component, the only place where a key is defined.

Hydra composes the YAML groups in ``moetrain/configs`` against these classes (see ``store.py``) and hands
the trainer plain frozen objects, so nothing below ``cli.py`` ever sees an OmegaConf node. Each component
receives its own sub-config, never the root. Router options live beside their router
(``moetrain/moe/routers``) and subclass :class:`RouterConfig`.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from omegaconf import MISSING

from moetrain.config.schema_balance import BalanceConfig
from moetrain.config.schema_data import DataConfig
from moetrain.config.schema_rope import RopeScaling
from moetrain.moe.options import ExpertsConfig, RouterConfig


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


class QKNorm(Enum):
    """``head``: RMSNorm over each head (Qwen3); ``full``: over all heads at once (OLMoE)."""

    none = "none"
    head = "head"
    full = "full"


class AttentionBackend(Enum):
    """``sdpa``: torch's scaled_dot_product_attention, by blocks of queries where there are documents or a
    window; ``blocks``: blocks of queries on a CPU; ``flex``: torch's FlexAttention, on a GPU; ``varlen``: its
    variable-length attention, on a GPU in bf16; ``auto``: the first that fits and passes a self-test."""

    auto = "auto"
    sdpa = "sdpa"
    blocks = "blocks"
    flex = "flex"
    varlen = "varlen"


class ScheduleKind(Enum):
    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"


class ExpertDispatch(Enum):
    """How rows reach experts on other ranks; docs/dispatchers.md.

    ``all_to_all``: one row an assignment, straight; ``hierarchical``: one row a node, which spreads it and
    may sum what goes back; ``all_gather``: every token to every rank of a small group.
    """

    all_to_all = "all_to_all"
    hierarchical = "hierarchical"
    all_gather = "all_gather"


class WandbMode(Enum):
    online = "online"
    offline = "offline"


@dataclass(frozen=True)
class ModelConfig:
    """One decoder, dense or MoE per layer. Widths in elements; ``num_experts`` is always global."""

    vocab_size: Optional[int] = None  # null: the tokenizer's
    d_model: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: Optional[int] = None  # null: num_heads
    head_dim: Optional[int] = None  # null: d_model / num_heads
    d_ff: int = 1024  # hidden width of a dense layer; its activation is experts.activation
    num_experts: int = 8  # 0: a dense model
    d_ff_expert: int = 512
    num_shared_experts: int = 0
    d_ff_shared: Optional[int] = None  # of all shared experts together; null: each as wide as d_ff_expert
    shared_gate: bool = False  # shared experts' output times sigmoid(x @ gate), one number a token
    moe_every: int = 1  # every n-th layer is MoE: the layers l with (l + 1) % n == 0
    first_dense: int = 0  # the first m layers are dense
    feed_forward: str = "moe"  # what builds the MoE layers; a plug-in may register another
    qkv_bias: bool = False  # of queries, keys and values (Qwen2)
    qk_norm: QKNorm = QKNorm.none
    sliding_window: Optional[int] = None  # in tokens, the query's own included
    attention: str = "grouped_query"  # what builds every layer's attention; a plug-in may register another
    attention_backend: AttentionBackend = AttentionBackend.auto
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    init_std: float = 0.02

    @property
    def shared_width(self) -> int:
        """Hidden units of all shared experts together; 0 where there are none."""
        if not self.num_shared_experts:
            return 0
        return self.num_shared_experts * self.d_ff_expert if self.d_ff_shared is None else self.d_ff_shared


@dataclass(frozen=True)
class OptimConfig:
    """``lr`` is the peak; weight decay applies to matrices only."""

    name: str = MISSING
    lr: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: Optional[float] = 1.0  # null: no clipping
    frozen: list[str] = field(default_factory=list)  # parameters that stay as they are, as "blocks.0.*"


@dataclass(frozen=True)
class AdamWConfig(OptimConfig):
    name: str = "adamw"


@dataclass(frozen=True)
class MuonConfig(OptimConfig):
    """Muon on hidden matrices, expert by expert; AdamW (``adamw_lr``) on embeddings, norms, routers."""

    name: str = "muon"
    lr: float = 0.02
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adamw_lr: float = 1e-3


@dataclass(frozen=True)
class ScheduleConfig:
    """A function of the step and ``horizon`` alone, never of ``train.steps``."""

    kind: ScheduleKind = ScheduleKind.cosine
    horizon: int = 400
    warmup_steps: int = 20
    decay_fraction: float = 0.2  # wsd only: the share of the horizon spent decaying
    min_ratio: float = 0.1  # of the peak


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


@dataclass(frozen=True)
class EngineConfig:
    name: str = "native"


@dataclass(frozen=True)
class TrackerConfig:
    """metrics.jsonl is always written; a tracker adds to it."""

    name: str = MISSING


@dataclass(frozen=True)
class JsonlTracker(TrackerConfig):
    name: str = "jsonl"


@dataclass(frozen=True)
class TensorboardTracker(TrackerConfig):
    name: str = "tensorboard"


@dataclass(frozen=True)
class WandbTracker(TrackerConfig):
    name: str = "wandb"
    mode: WandbMode = WandbMode.offline
    project: str = "moetrain"
    entity: Optional[str] = None
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunConfig:
    """``dir`` wins, then ``root/name``, then ``root/<time, by rank 0>``; a sweep adds its job number."""

    root: str = "runs"
    name: Optional[str] = None
    dir: Optional[str] = None


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 100  # steps; 0: only the final one
    keep_last: int = 3
    async_save: bool = False


@dataclass(frozen=True)
class LoopConfig:
    """The ``train`` section. ``micro_batch_size`` is in sequences per rank, at most."""

    task: str = "next_token"  # what the loss is of; a plug-in may register another
    steps: int = 400
    seed: int = 0
    deterministic: bool = False
    threads: Optional[int] = None  # CPU threads per rank; null: OMP_NUM_THREADS, else cores / local ranks
    device: str = "auto"  # auto | cpu | cuda
    micro_batch_size: int = 8
    global_batch_tokens: int = 8192
    precision: Precision = Precision.fp32
    residual: Residual = Residual.same
    recompute: bool = False
    compile: bool = False
    eval_every: int = 100  # steps; 0: only at the end
    eval_samples: Optional[int] = None  # sequences; null: the whole held-out split
    on_nonfinite: OnNonFinite = OnNonFinite.stop
    spike_factor: Optional[float] = None  # a loss this many times its running mean counts as non-finite
    sample_prompt: str = "def "
    sample_tokens: int = 96


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
    init_from: Optional[str] = None  # the model to start from: a run, converted or Hugging Face folder
    init_optimizer: bool = False  # take the optimizer's state from there too
    resume: str = "auto"  # auto | none | a checkpoint's path
    resume_changes: list[str] = field(default_factory=list)  # keys that may differ then; docs/resume.md
    plugins: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class VerifyOptions:
    """``world``: the ranks of the run to come; null: the fewest that ``parallel`` allows, two at least."""

    world: Optional[int] = None
    ranks: int = 8  # processes that the proof may take; a larger layout is proved on a smaller one


@dataclass(frozen=True)
class VerifyConfig(TrainConfig):
    """The root of ``moetrain verify``: what ``moetrain train`` takes, and how to prove it."""

    verify: VerifyOptions = field(default_factory=VerifyOptions)


@dataclass(frozen=True)
class GenerateConfig:
    """The root of ``moetrain generate``. ``temperature`` 0 is greedy."""

    checkpoint: str = MISSING  # a run folder (its newest checkpoint) or one checkpoint
    prompt: Optional[str] = None
    prompt_file: Optional[str] = None
    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: Optional[int] = None
    top_p: Optional[float] = None
    seed: int = 0
    device: str = "auto"
    precision: Precision = Precision.fp32
    plugins: list[str] = field(default_factory=list)  # the packages that a run's own router needs
