"""The attention half of a block: a registry of modules, and grouped-query attention, which is ours.

``model.attention`` names the builder of every layer's, or ``model.attention_pattern`` those of the layers in
turn; ``model.attention_backend`` what computes the scaled
dot products (``ops/attention``).

Shapes: B batch, S sequence, D model, H head width, Q query heads, G key and value heads, K keys;
in weights Q and G stand for all columns of these heads (heads times H), and N for the query heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moetrain.errors import UserError
from moetrain.models.cache import LayerCache
from moetrain.models.norm import RMSNorm
from moetrain.models.options import LATENT, AttentionBackend, ModelConfig, QKNorm, attention_of, window_of
from moetrain.models.rope import Rope, apply_rope, rope_width
from moetrain.models.rules import check_heads
from moetrain.ops.attention import AUTO, Case, Plan, SeenKeys, attend, plan_attention, refusal
from moetrain.ops.init import Constant, Normal, parameter, with_own_values
from moetrain.ops.low_rank import linear_beside, linears_beside
from moetrain.ops.precision import product_dtype


class Heads(NamedTuple):
    """What :func:`~moetrain.ops.attention.attend` is called with; plans and FLOPs go by it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


class AttentionLayer(nn.Module):
    """What a decoder asks of a layer's attention, beside its forward.

    heads     of the queries, keys and values that it attends with; None: it has no scores of pairs of tokens,
              and its plan says what a token sees and no more.
    rope_dim  how many elements of a head positions turn: the width of the table that it is given; even.
    sinks     whether it calls :func:`attend` with sinks.
    """

    heads: Heads | None
    rope_dim: int
    sinks: bool = False

    def score_flops(self, keys: float) -> float:
        """Forward operations of a token beyond the products with parameters, where it sees ``keys`` keys."""
        if self.heads is None:
            raise NotImplementedError
        return 2 * 2 * self.heads.num_heads * self.heads.head_dim * keys

    def forward(self, x_BSD: Tensor, rope: Rope, plan: Plan, cache: LayerCache | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D]; ``plan`` is :func:`attend`'s. New keys and values join ``cache``."""
        raise NotImplementedError


Builder = Callable[[ModelConfig, int], AttentionLayer]  # the last: its layer's place
OWN_ATTENTION = "grouped_query"
SHIPPED = frozenset((OWN_ATTENTION, LATENT, "gated_delta"))  # those that families have words for
NO_SCORES = "none"  # the backend of a plan for layers without any
ATTENTIONS: dict[str, Builder] = {}
_ON_META: set[Builder] = set()


def register_attention(name: str, on_meta: bool = False) -> Callable[[Builder], Builder]:
    """Decorator: make a builder ``(cfg, layer)`` known by name, ``layer`` its place from 0.

    A second use of a name is an error. What the builder refuses it says by ValueError, in one line.
    ``on_meta`` is :func:`~moetrain.models.feed_forward.register_feed_forward`'s.
    """

    def add(builder: Builder) -> Builder:
        if ATTENTIONS.setdefault(name, builder) is not builder:
            raise ValueError(f"attention {name!r} is registered already")
        if on_meta:
            _ON_META.add(builder)
        return builder

    return add


def build_attention(cfg: ModelConfig, layer: int) -> AttentionLayer:
    """Raises ValueError for an unknown name."""
    name = attention_of(cfg, layer)
    if name not in ATTENTIONS:
        raise ValueError(f"unknown attention {name!r}; known: {', '.join(sorted(ATTENTIONS))}")
    builder = ATTENTIONS[name]
    return builder(cfg, layer) if builder in _ON_META else with_own_values(lambda: builder(cfg, layer))


def head_shape(cfg: ModelConfig) -> Heads:
    """Those of the config, nulls resolved. Raises UserError if they do not fit."""
    check_heads(cfg)
    num_kv_heads = cfg.num_heads if cfg.num_kv_heads is None else cfg.num_kv_heads
    head_dim = cfg.d_model // cfg.num_heads if cfg.head_dim is None else cfg.head_dim
    return Heads(cfg.num_heads, num_kv_heads, head_dim)


def plan_of(
    cfg: ModelConfig,
    heads: Heads | None,
    x_BSD: Tensor,
    seen: SeenKeys | None,
    cached: int | None = None,
    sinks: bool = False,
) -> Plan:
    """How the layers with such ``heads`` (and ``sinks``, or none) attend in one forward pass over ``x_BSD``.

    ``cached``: keys in the cache that the new ones join; None: there is no cache. With one,
    ``cfg.attention_backend`` counts as ``auto``.

    Raises UserError where ``cfg.attention_backend`` cannot compute it.
    """
    if heads is None:
        return Plan(NO_SCORES, seen)
    batch, seq = x_BSD.shape[:2]
    case = _case(heads, batch, seq, cached or 0, seen, product_dtype(x_BSD), x_BSD.device, sinks)
    try:
        return plan_attention(cfg.attention_backend.value if cached is None else AUTO, case)
    except ValueError as error:
        raise _unfit(cfg, str(error)) from None


def require_backend(
    cfg: ModelConfig, seq: int, dtype: torch.dtype, device: torch.device, tested: bool = True
) -> None:
    """UserError where ``cfg.attention_backend`` cannot compute ``seq`` tokens in ``dtype`` on ``device``.

    ``tested``: or where it fails its self-test there, which takes memory on the device.
    """
    if cfg.attention_backend is AttentionBackend.auto:
        return
    with torch.device("meta"):
        layers = [build_attention(cfg, layer) for layer in range(cfg.num_layers)]
    kinds = [(layer.heads, layer.sinks, window_of(cfg, place)) for place, layer in enumerate(layers)]
    for heads, sinks, window in dict.fromkeys(kinds):
        if heads is None:
            continue
        case = _case(heads, 1, seq, 0, SeenKeys(seq, window=window), dtype, device, sinks)
        reason = refusal(cfg.attention_backend.value, case, tested)
        if reason is not None:
            raise _unfit(cfg, reason)


def _unfit(cfg: ModelConfig, reason: str) -> UserError:
    key = "model.attention_backend"
    return UserError(f"{key}={cfg.attention_backend.value}: {reason}; set {key}=auto")


def _case(
    heads: Heads,
    batch: int,
    seq: int,
    cached: int,
    seen: SeenKeys | None,
    dtype: torch.dtype,
    device: torch.device,
    sinks: bool,
) -> Case:
    num_heads, num_kv_heads, head_dim = heads
    return Case(seen, batch, seq, cached, (num_heads, num_kv_heads), head_dim, dtype, device, sinks)


class Attention(AttentionLayer):
    """Causal grouped-query self-attention. The normalisation of queries and keys follows ``cfg.qk_norm``."""

    takes_low_rank = ("w_q_QD", "w_k_GD", "w_v_GD", "w_gate_QD", "w_out_DQ")

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.heads = head_shape(cfg)
        self.num_heads, self.num_kv_heads, self.head_dim = self.heads
        self.rope_dim, self.interleaved = rope_width(self.head_dim, cfg.rope_fraction), cfg.rope_interleaved
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        initializer, zero, biased = Normal(cfg.init_std), Constant(0.0), cfg.qkv_bias
        self.w_q_QD = parameter((queries, cfg.d_model), initializer)
        self.w_k_GD = parameter((keys, cfg.d_model), initializer)
        self.w_v_GD = parameter((keys, cfg.d_model), initializer)
        self.b_q_Q = parameter((queries,), zero) if biased else None
        self.b_k_G = parameter((keys,), zero) if biased else None
        self.b_v_G = parameter((keys,), zero) if biased else None
        self.w_out_DQ = parameter((cfg.d_model, queries), initializer)
        self.b_out_D = parameter((cfg.d_model,), zero) if cfg.out_bias else None
        self.b_sink_N = parameter((self.num_heads,), zero) if cfg.attention_sinks else None
        self.sinks = cfg.attention_sinks
        gated = cfg.attention_gate
        self.w_gate_QD = parameter((queries, cfg.d_model), initializer) if gated else None
        # what makes 1 / sqrt(head_dim), by which every backend multiplies, the model's own
        scale = cfg.scales.attention
        self.query_scale = 1.0 if scale is None else scale * self.head_dim**0.5
        self.qk_norm = cfg.qk_norm
        if cfg.qk_norm is not QKNorm.none:
            per_head = cfg.qk_norm is not QKNorm.full
            widths = (self.head_dim, self.head_dim) if per_head else (queries, keys)
            self.q_norm, self.k_norm = (
                RMSNorm(width, cfg.norm_eps, cfg.zero_centered_norms) for width in widths
            )

    def forward(self, x_BSD: Tensor, rope: Rope, plan: Plan, cache: LayerCache | None = None) -> Tensor:
        q_BSQH, k_BSGH, v_BSGH, *gate_BSQ = self._project(x_BSD)
        q_BSQH, k_BSGH = (apply_rope(x, rope, self.interleaved) for x in (q_BSQH, k_BSGH))
        if self.qk_norm is QKNorm.head_after_rope:
            q_BSQH, k_BSGH = self.q_norm(q_BSQH), self.k_norm(k_BSGH)
        if self.query_scale != 1:
            q_BSQH = q_BSQH * self.query_scale
        q_BQSH, k_BGKH, v_BGKH = (x.transpose(1, 2) for x in (q_BSQH, k_BSGH, v_BSGH))
        if cache is not None:
            k_BGKH, v_BGKH = cache.append(k_BGKH, v_BGKH)
        out_BSQ = attend(q_BQSH, k_BGKH, v_BGKH, plan, self.b_sink_N).flatten(2)
        if gate_BSQ:
            out_BSQ = out_BSQ * gate_BSQ[0].sigmoid()
        return linear_beside(out_BSQ, self, "w_out_DQ", self.b_out_D)

    def _project(self, x_BSD: Tensor) -> list[Tensor]:
        """Queries, keys and values by heads, and the gate's logits where there is one."""
        leaves: list[str] = ["w_q_QD", "w_k_GD", "w_v_GD"]
        biases = [self.b_q_Q, self.b_k_G, self.b_v_G]
        if self.w_gate_QD is not None:
            leaves, biases = [*leaves, "w_gate_QD"], [*biases, None]
        parts = linears_beside(x_BSD, self, leaves, biases)
        parts, gate = parts[:3], parts[3:]
        if self.qk_norm is QKNorm.full:
            parts[0], parts[1] = self.q_norm(parts[0]), self.k_norm(parts[1])
        parts = [part.unflatten(-1, (-1, self.head_dim)) for part in parts]
        if self.qk_norm is QKNorm.head:
            parts[0], parts[1] = self.q_norm(parts[0]), self.k_norm(parts[1])
        return [*parts, *gate]


@register_attention(OWN_ATTENTION, on_meta=True)
def _grouped_query(cfg: ModelConfig, layer: int) -> AttentionLayer:
    return Attention(cfg)
