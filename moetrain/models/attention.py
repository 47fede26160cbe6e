"""Grouped-query attention: projections, rotation, scaled dot products, output projection.

Shapes: B batch, S sequence, D model, H head width, Q query heads, G key and value heads, K keys;
in weights Q and G stand for all columns of these heads (heads times H).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.errors import UserError
from moetrain.models.cache import LayerCache
from moetrain.models.norm import RMSNorm
from moetrain.models.options import AttentionBackend, ModelConfig, QKNorm
from moetrain.models.rope import Rope, apply_rope
from moetrain.ops.attention import AUTO, Case, Plan, SeenKeys, attend, plan_attention, refusal
from moetrain.ops.init import Constant, Normal, parameter
from moetrain.ops.linear import linear, linears
from moetrain.ops.precision import product_dtype


def head_shape(cfg: ModelConfig) -> tuple[int, int, int]:
    """(query heads, key and value heads, head width), nulls resolved. Raises UserError if they do not fit."""
    num_kv_heads = cfg.num_heads if cfg.num_kv_heads is None else cfg.num_kv_heads
    if num_kv_heads < 1 or cfg.num_heads % num_kv_heads:
        raise UserError(f"model.num_kv_heads={num_kv_heads} must divide model.num_heads={cfg.num_heads}")
    if cfg.head_dim is None and cfg.d_model % cfg.num_heads:
        raise UserError(
            f"model.num_heads={cfg.num_heads} must divide model.d_model={cfg.d_model}; or set model.head_dim"
        )
    head_dim = cfg.d_model // cfg.num_heads if cfg.head_dim is None else cfg.head_dim
    if head_dim < 2 or head_dim % 2:
        raise UserError(f"a head is {head_dim} wide (model.head_dim); rotary embedding needs an even width")
    return cfg.num_heads, num_kv_heads, head_dim


def plan_of(cfg: ModelConfig, x_BSD: Tensor, seen: SeenKeys | None, cached: int | None = None) -> Plan:
    """How the layers of one forward pass over ``x_BSD`` attend.

    ``cached``: keys in the cache that the new ones join; None: there is no cache. With one, ``cfg.attention``
    counts as ``auto``.

    Raises UserError where ``cfg.attention`` cannot compute it.
    """
    batch, seq = x_BSD.shape[:2]
    case = _case(cfg, batch, seq, cached or 0, seen, product_dtype(x_BSD), x_BSD.device)
    try:
        return plan_attention(cfg.attention.value if cached is None else AUTO, case)
    except ValueError as error:
        raise UserError(f"model.attention={cfg.attention.value}: {error}; set model.attention=auto") from None


def require_backend(
    cfg: ModelConfig, seq: int, dtype: torch.dtype, device: torch.device, tested: bool = True
) -> None:
    """UserError where ``cfg.attention`` cannot compute ``seq`` tokens in ``dtype`` on ``device``.

    ``tested``: or where it fails its self-test there, which takes memory on the device.
    """
    if cfg.attention is AttentionBackend.auto:
        return
    seen = SeenKeys(seq, window=cfg.sliding_window)
    reason = refusal(cfg.attention.value, _case(cfg, 1, seq, 0, seen, dtype, device), tested)
    if reason is not None:
        raise UserError(f"model.attention={cfg.attention.value}: {reason}; set model.attention=auto")


def _case(
    cfg: ModelConfig,
    batch: int,
    seq: int,
    cached: int,
    seen: SeenKeys | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    num_heads, num_kv_heads, head_dim = head_shape(cfg)
    return Case(seen, batch, seq, cached, (num_heads, num_kv_heads), head_dim, dtype, device)


class Attention(nn.Module):
    """Causal self-attention. The normalisation of queries and keys follows ``cfg.qk_norm``."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = head_shape(cfg)
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
        """``plan`` is :func:`attend`'s."""
        q_BSQH, k_BSGH, v_BSGH = self._project(x_BSD)
        q_BQSH = apply_rope(q_BSQH, rope).transpose(1, 2)
        k_BGKH, v_BGKH = apply_rope(k_BSGH, rope).transpose(1, 2), v_BSGH.transpose(1, 2)
        if cache is not None:
            k_BGKH, v_BGKH = cache.append(k_BGKH, v_BGKH)
        return linear(attend(q_BQSH, k_BGKH, v_BGKH, plan).flatten(2), self.w_out_DQ)

    def _project(self, x_BSD: Tensor) -> list[Tensor]:
        weights, biases = (self.w_q_QD, self.w_k_GD, self.w_v_GD), (self.b_q_Q, self.b_k_G, self.b_v_G)
        parts = linears(x_BSD, weights, biases)
        if self.qk_norm is QKNorm.full:
            parts[0], parts[1] = self.q_norm(parts[0]), self.k_norm(parts[1])
        parts = [part.unflatten(-1, (-1, self.head_dim)) for part in parts]
        if self.qk_norm is QKNorm.head:
            parts[0], parts[1] = self.q_norm(parts[0]), self.k_norm(parts[1])
        return parts
