"""The ``model`` section of the configuration: one decoder."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from moetrain.models.rope_options import RopeScaling


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
