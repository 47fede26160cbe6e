"""The ``model`` section of the configuration: one decoder."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from moetrain.bounds import above, at_least, within
from moetrain.models.attention_options import GatedDeltaConfig
from moetrain.models.future_options import FutureConfig
from moetrain.models.latent_options import LatentConfig
from moetrain.models.layer_options import (
    AvgKConfig,
    MergingConfig,
    MonetConfig,
    ProductKeysConfig,
    S2MoEConfig,
)
from moetrain.models.lora_options import LoraConfig
from moetrain.models.rope_options import RopeScaling
from moetrain.models.scale_options import ScalesConfig
from moetrain.models.wiring_options import MomentumConfig, RouterInput, ShortcutFrom, Wiring

_INT32 = 2**31 - 1
_SIZE, _COUNT = at_least(1, _INT32), at_least(0, _INT32)
LATENT = "latent"  # model.attention


class QKNorm(Enum):
    """``head``: RMSNorm over each head (Qwen3); ``head_after_rope``: likewise, after the head has turned
    (Hunyuan); ``full``: over all heads at once (OLMoE)."""

    none = "none"
    head = "head"
    head_after_rope = "head_after_rope"
    full = "full"


class LayerWindow(Enum):
    """``sliding``: a layer with ``sliding_window``; ``full``: one that sees all before."""

    sliding = "sliding"
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


@dataclass(frozen=True)
class ModelConfig:
    """One decoder, dense or MoE per layer. Widths in elements; ``num_experts`` is always global."""

    vocab_size: Optional[int] = field(default=None, metadata=_SIZE)  # null: the tokenizer's
    d_model: int = field(default=256, metadata=_SIZE)
    num_layers: int = field(default=4, metadata=at_least(1, 10_000))
    num_heads: int = field(default=4, metadata=_SIZE)
    num_kv_heads: Optional[int] = field(default=None, metadata=_SIZE)  # null: num_heads
    head_dim: Optional[int] = field(default=None, metadata=_SIZE)  # null: d_model / num_heads
    # hidden width of a dense layer; its activation is experts.activation
    d_ff: int = field(default=1024, metadata=_SIZE)
    num_experts: int = field(default=8, metadata=at_least(0, 2**24))  # 0: a dense model
    d_ff_expert: int = field(default=512, metadata=_SIZE)
    num_shared_experts: int = field(default=0, metadata=_COUNT)
    # of all shared experts together; null: each as wide as d_ff_expert
    d_ff_shared: Optional[int] = field(default=None, metadata=_SIZE)
    shared_gate: bool = False  # shared experts' output times sigmoid(x @ gate), one number a token
    # every n-th layer is MoE: the layers l with (l + 1) % n == 0
    moe_every: int = field(default=1, metadata=_SIZE)
    first_dense: int = field(default=0, metadata=_COUNT)  # the first m layers are dense
    # experts of each MoE layer in turn, and their width; []: all alike. The largest is what
    # num_experts and d_ff_expert say
    layer_experts: tuple[int, ...] = field(default=(), metadata=_SIZE)
    layer_widths: tuple[int, ...] = field(default=(), metadata=_SIZE)
    # hidden width of each expert of a layer; the largest is d_ff_expert. []: all alike
    expert_widths: tuple[int, ...] = field(default=(), metadata=_SIZE)
    feed_forward: str = "moe"  # what builds the MoE layers; a plug-in may register another
    wiring: Wiring = Wiring.plain  # of the blocks whose layer is MoE
    shortcut_from: ShortcutFrom = ShortcutFrom.previous_attention  # of wiring=shortcut
    momentum: MomentumConfig = field(default_factory=MomentumConfig)  # of wiring=momentum
    router_input: RouterInput = RouterInput.own
    product_keys: ProductKeysConfig = field(default_factory=ProductKeysConfig)  # feed_forward=peer, pkm
    monet: MonetConfig = field(default_factory=MonetConfig)  # feed_forward=monet
    merging: MergingConfig = field(default_factory=MergingConfig)  # feed_forward=smear, meo
    s2moe: S2MoEConfig = field(default_factory=S2MoEConfig)  # feed_forward=s2moe
    avg_k: AvgKConfig = field(default_factory=AvgKConfig)  # feed_forward=avg_k
    qkv_bias: bool = False  # of queries, keys and values (Qwen2)
    mlp_bias: bool = False  # of dense layers' matrices (Llama); experts have none by it
    out_bias: bool = False  # of attention's output (GPT-OSS)
    # a learned logit of each head in the softmax of attention, of no key (GPT-OSS)
    attention_sinks: bool = False
    qk_norm: QKNorm = QKNorm.none
    # in tokens, the query's own included
    sliding_window: Optional[int] = field(default=None, metadata=_SIZE)
    # which layers have it, from the first on, over and over: [sliding,full] every other; []: all
    window_pattern: tuple[LayerWindow, ...] = ()
    attention: str = "grouped_query"  # what builds every layer's attention; a plug-in may register another
    latent: LatentConfig = field(default_factory=LatentConfig)  # attention=latent
    # names of attentions, taken in turn by the layers; []: every layer's is what attention says
    attention_pattern: tuple[str, ...] = ()
    gated_delta: GatedDeltaConfig = field(default_factory=GatedDeltaConfig)  # attention gated_delta
    attention_gate: bool = False  # a head's output times sigmoid(x @ gate), by element (Qwen3-Next)
    attention_backend: AttentionBackend = AttentionBackend.auto
    rope_theta: float = field(default=10000.0, metadata=above(0))
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    # of the layers with the window, which are then not scaled; null: as all layers (Gemma 3)
    window_rope_theta: Optional[float] = field(default=None, metadata=above(0))
    # of a head's elements, the first ones: those that positions turn (partial rope); an even number of them
    rope_fraction: float = field(default=1.0, metadata=within(0, 1, open_low=True))
    rope_interleaved: bool = False  # turned pairs are neighbours (ERNIE), not elements half a width apart
    zero_centered_norms: bool = False  # norms multiply by 1 + weight, which starts at 0 (Gemma, Qwen3-Next)
    # norms of what attention and the feed-forward layer give, besides those of what they read (Gemma)
    sandwich_norms: bool = False
    scales: ScalesConfig = field(default_factory=ScalesConfig)
    norm_eps: float = field(default=1e-5, metadata=above(0))
    tie_embeddings: bool = True
    init_std: float = field(default=0.02, metadata=at_least(0))
    lora: LoraConfig = field(default_factory=LoraConfig)  # low-rank products beside matrices
    future: FutureConfig = field(default_factory=FutureConfig)  # layers that predict further tokens

    @property
    def shared_width(self) -> int:
        """Hidden units of all shared experts together; 0 where there are none."""
        if not self.num_shared_experts:
            return 0
        return self.num_shared_experts * self.d_ff_expert if self.d_ff_shared is None else self.d_ff_shared


def is_moe_layer(cfg: ModelConfig, layer: int) -> bool:
    """Whether layer ``layer`` (from 0) is MoE; those from ``num_layers`` on predict further tokens."""
    if layer >= cfg.num_layers:
        return cfg.num_experts > 0 and not cfg.future.dense
    return cfg.num_experts > 0 and layer >= cfg.first_dense and (layer + 1) % cfg.moe_every == 0


def moe_layers(cfg: ModelConfig) -> list[int]:
    """The places of the MoE layers, without those that predict further tokens."""
    return [layer for layer in range(cfg.num_layers) if is_moe_layer(cfg, layer)]


def future_layers(cfg: ModelConfig) -> range:
    """The places of the layers that predict further tokens: they follow the decoder's."""
    return range(cfg.num_layers, cfg.num_layers + cfg.future.layers)


def attention_of(cfg: ModelConfig, layer: int) -> str:
    """The name of a layer's attention; of one that predicts further tokens, the last layer's."""
    pattern, layer = cfg.attention_pattern, min(layer, cfg.num_layers - 1)
    return pattern[layer % len(pattern)] if pattern else cfg.attention


def attention_kinds(cfg: ModelConfig) -> list[str]:
    """The names of all layers' attentions, each once."""
    return list(dict.fromkeys(attention_of(cfg, layer) for layer in range(cfg.num_layers)))


def experts_of(cfg: ModelConfig, layer: int) -> int:
    """The number of experts of an MoE layer."""
    return cfg.layer_experts[moe_layers(cfg).index(layer)] if cfg.layer_experts else cfg.num_experts


def width_of(cfg: ModelConfig, layer: int) -> int:
    """``d_ff_expert`` of an MoE layer."""
    return cfg.layer_widths[moe_layers(cfg).index(layer)] if cfg.layer_widths else cfg.d_ff_expert


def window_of(cfg: ModelConfig, layer: int) -> Optional[int]:
    """``sliding_window`` of a layer; None where it has none. As :func:`attention_of` after the last."""
    pattern, layer = cfg.window_pattern, min(layer, cfg.num_layers - 1)
    full = bool(pattern) and pattern[layer % len(pattern)] is LayerWindow.full
    return None if full else cfg.sliding_window


def rope_of(cfg: ModelConfig, layer: int) -> tuple[float, RopeScaling]:
    """Base and scaling by which positions turn a layer's heads."""
    if cfg.window_rope_theta is None or window_of(cfg, layer) is None:
        return cfg.rope_theta, cfg.rope_scaling
    return cfg.window_rope_theta, RopeScaling()
