"""The attention half of a block: a registry of modules, and grouped-query attention, which is ours.

``model.attention`` names the builder of every layer's; ``model.attention_backend`` what computes the scaled
dot products (``ops/attention``).

Shapes: B batch, S sequence, D model, H head width, Q query heads, G key and value heads, K keys;
in weights Q and G stand for all columns of these heads (heads times H).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moetrain.errors import UserError
from moetrain.models.cache import LayerCache
from moetrain.models.norm import RMSNorm
from moetrain.models.options import AttentionBackend, ModelConfig, QKNorm
from moetrain.models.rope import Rope, apply_rope
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

    heads     of the queries, keys and values that it attends with.
    rope_dim  how many elements of a head positions turn: the width of the table that it is given; even.
    """

    heads: Heads
    rope_dim: int

    def forward(self, x_BSD: Tensor, rope: Rope, plan: Plan, cache: LayerCache | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D]; ``plan`` is :func:`attend`'s. New keys and values join ``cache``."""
        raise NotImplementedError


Builder = Callable[[ModelConfig, int], AttentionLayer]  # the last: its layer's place
OWN_ATTENTION = "grouped_query"
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
    """Raises ValueError for an unknown ``cfg.attention``."""
    if cfg.attention not in ATTENTIONS:
        raise ValueError(f"unknown attention {cfg.attention!r}; known: {', '.join(sorted(ATTENTIONS))}")
    builder = ATTENTIONS[cfg.attention]
    return builder(cfg, layer) if builder in _ON_META else with_own_values(lambda: builder(cfg, layer))


def head_shape(cfg: ModelConfig) -> Heads:
    """Those of the config, nulls resolved. Raises UserError if they do not fit."""
    check_heads(cfg)
    num_kv_heads = cfg.num_heads if cfg.num_kv_heads is None else cfg.num_kv_heads
    head_dim = cfg.d_model // cfg.num_heads if cfg.head_dim is None else cfg.head_dim
    return Heads(cfg.num_heads, num_kv_heads, head_dim)


def plan_of(
    cfg: ModelConfig, heads: Heads, x_BSD: Tensor, seen: SeenKeys | None, cached: int | None = None
) -> Plan:
    """How the layers with such ``heads`` attend in one forward pass over ``x_BSD``.

    ``cached``: keys in the cache that the new ones join; None: there is no cache. With one,
    ``cfg.attention_backend`` counts as ``auto``.

    Raises UserError where ``cfg.attention_backend`` cannot compute it.
    """
    batch, seq = x_BSD.shape[:2]
    case = _case(heads, batch, seq, cached or 0, seen, product_dtype(x_BSD), x_BSD.device)
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
    seen = SeenKeys(seq, window=cfg.sliding_window)
    with torch.device("meta"):
        layers = [build_attention(cfg, layer) for layer in range(cfg.num_layers)]
    for heads in dict.fromkeys(layer.heads for layer in layers):
        case = _case(heads, 1, seq, 0, seen, dtype, device)
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
) -> Case:
    num_heads, num_kv_heads, head_dim = heads
    return Case(seen, batch, seq, cached, (num_heads, num_kv_heads), head_dim, dtype, device)


class Attention(AttentionLayer):
    """Causal grouped-query self-attention. The normalisation of queries and keys follows ``cfg.qk_norm``."""

    takes_low_rank = ("w_q_QD", "w_k_GD", "w_v_GD", "w_out_DQ")

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.heads = head_shape(cfg)
        self.num_heads, self.num_kv_heads, self.head_dim = self.heads
        self.rope_dim = self.head_dim
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        initializer, zero, biased = Normal(cfg.init_std), Constant(0.0), cfg.qkv_bias
        self.w_q_QD = parameter((queries, cfg.d_model), initializer)
        self.w_k_GD = parameter((keys, cfg.d_model), initializer)
        self.w_v_GD = parameter((keys, cfg.d_model), initializer)
        self.b_q_Q = parameter((queries,), zero) if biased else None
        self.b_k_G = parameter((keys,), zero) if biased else None
        self.b_v_G = parameter((keys,), zero) if biased else None
        self.w_out_DQ = parameter((cfg.d_model, queries), initializer)
        self.qk_norm = cfg.qk_norm
        if cfg.qk_norm is not QKNorm.none:
            per_head = cfg.qk_norm is QKNorm.head
            self.q_norm = RMSNorm(self.head_dim if per_head else queries, cfg.norm_eps)
            self.k_norm = RMSNorm(self.head_dim if per_head else keys, cfg.norm_eps)

    def forward(self, x_BSD: Tensor, rope: Rope, plan: Plan, cache: LayerCache | None = None) -> Tensor:
        q_BSQH, k_BSGH, v_BSGH = self._project(x_BSD)
        q_BQSH = apply_rope(q_BSQH, rope).transpose(1, 2)
        k_BGKH, v_BGKH = apply_rope(k_BSGH, rope).transpose(1, 2), v_BSGH.transpose(1, 2)
        if cache is not None:
            k_BGKH, v_BGKH = cache.append(k_BGKH, v_BGKH)
        out_BSQ = attend(q_BQSH, k_BGKH, v_BGKH, plan).flatten(2)
        return linear_beside(out_BSQ, self, "w_out_DQ")

    def _project(self, x_BSD: Tensor) -> list[Tensor]:
        biases = [self.b_q_Q, self.b_k_G, self.b_v_G]
        parts = linears_beside(x_BSD, self, ["w_q_QD", "w_k_GD", "w_v_GD"], biases)
        if self.qk_norm is QKNorm.full:
            parts[0], parts[1] = self.q_norm(parts[0]), self.k_norm(parts[1])
        parts = [part.unflatten(-1, (-1, self.head_dim)) for part in parts]
        if self.qk_norm is QKNorm.head:
            parts[0], parts[1] = self.q_norm(parts[0]), self.k_norm(parts[1])
        return parts


@register_attention(OWN_ATTENTION, on_meta=True)
def _grouped_query(cfg: ModelConfig, layer: int) -> AttentionLayer:
    return Attention(cfg)
