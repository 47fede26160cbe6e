"""A plug-in attention: ``plugins=[latent_attention]``, ``model.attention=narrow``.

Keys and values are made of one narrow vector a token, and only half of each head turns with the position
(a toy of what DeepSeek-V2 does, arXiv:2405.04434).

Shapes: B batch, S sequence, D model, L latent, N heads, H head width; in weights Q stands for N times H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.models.attention import AttentionLayer, Heads, head_shape, register_attention
from moetrain.models.cache import LayerCache
from moetrain.models.norm import RMSNorm
from moetrain.models.options import ModelConfig
from moetrain.models.rope import Rope, apply_rope
from moetrain.ops.attention import Plan, attend
from moetrain.ops.init import Normal, parameter
from moetrain.ops.linear import linear

LATENT = 5


class LatentAttention(AttentionLayer):
    def __init__(self, cfg: ModelConfig, heads: Heads) -> None:
        super().__init__()
        self.heads, self.rope_dim = heads, heads.head_dim // 2
        queries, initializer = heads.num_heads * heads.head_dim, Normal(cfg.init_std)
        self.w_q_QD = parameter((queries, cfg.d_model), initializer)
        self.w_latent_LD = parameter((LATENT, cfg.d_model), initializer)
        self.latent_norm = RMSNorm(LATENT, cfg.norm_eps)
        self.w_k_QL = parameter((queries, LATENT), initializer)
        self.w_v_QL = parameter((queries, LATENT), initializer)
        self.w_out_DQ = parameter((cfg.d_model, queries), initializer)

    def forward(self, x_BSD: Tensor, rope: Rope, plan: Plan, cache: LayerCache | None = None) -> Tensor:
        latent_BSL = self.latent_norm(linear(x_BSD, self.w_latent_LD))
        pairs = ((x_BSD, self.w_q_QD), (latent_BSL, self.w_k_QL), (latent_BSL, self.w_v_QL))
        q_BSNH, k_BSNH, v_BSNH = (
            linear(x, w).unflatten(-1, (self.heads.num_heads, self.heads.head_dim)) for x, w in pairs
        )
        q_BNSH, k_BNSH = self._turned(q_BSNH, rope), self._turned(k_BSNH, rope)
        v_BNSH = v_BSNH.transpose(1, 2)
        if cache is not None:
            k_BNSH, v_BNSH = cache.append(k_BNSH, v_BNSH)
        return linear(attend(q_BNSH, k_BNSH, v_BNSH, plan).flatten(2), self.w_out_DQ)

    def _turned(self, x_BSNH: Tensor, rope: Rope) -> Tensor:
        turning, still = x_BSNH.split([self.rope_dim, x_BSNH.shape[-1] - self.rope_dim], -1)
        return torch.cat([apply_rope(turning, rope), still], -1).transpose(1, 2)


@register_attention("narrow", on_meta=True)
def build(cfg: ModelConfig, layer: int) -> AttentionLayer:
    num_heads, _, head_dim = head_shape(cfg)
    if head_dim % 4:
        raise ValueError(f"half of a head turns, and model.head_dim={head_dim} is no multiple of 4")
    return LatentAttention(cfg, Heads(num_heads, num_heads, head_dim))
