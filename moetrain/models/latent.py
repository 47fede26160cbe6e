"""Multi-head latent attention: keys and values are made of one narrow vector a token, which is cached.

Source: DeepSeek-AI 2024, "DeepSeek-V2", arXiv:2405.04434, section 2.1.

Shapes: B batch, S new tokens, K keys, D model, N heads, H width that all three are attended with; R queries'
latent, L keys' and values' latent, r elements that turn; in weights Q stands for the queries' columns, P for
those of L and r, U for those that a head makes of L, O for the values'.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.models.attention import AttentionLayer, Heads, register_attention
from moetrain.models.cache import LayerCache
from moetrain.models.norm import RMSNorm
from moetrain.models.options import LATENT, ModelConfig
from moetrain.models.rope import Rope, apply_rope
from moetrain.models.rope_options import RopeScaling
from moetrain.ops.attention import Plan, attend
from moetrain.ops.init import Normal, parameter
from moetrain.ops.low_rank import linear_beside, linears_beside


class LatentAttention(AttentionLayer):
    """Causal; scores are scaled by the queries' own width, and by ``mscale_all_dim`` where yarn has it.

    Backends take queries, keys and values of one width: the narrower ones are filled up with zeros.
    """

    heads: Heads
    takes_low_rank = ("w_q_QD", "w_q_RD", "w_q_QR", "w_kv_PD", "w_kv_UL", "w_out_DO")

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        m, heads = cfg.latent, cfg.num_heads
        self.still, self.rope_dim, self.value_dim = m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim
        self.latent_dim, self.interleaved = m.kv_lora_rank, cfg.rope_interleaved
        score_dim = self.still + self.rope_dim
        self.heads = Heads(heads, heads, max(score_dim, self.value_dim))
        self.score_dim = score_dim
        # attend() divides by the root of the width that it sees
        self.score_factor = score_scale(cfg.rope_scaling) * math.sqrt(self.heads.head_dim / score_dim)
        initializer, queries = Normal(cfg.init_std), heads * score_dim
        rows, made = m.kv_lora_rank + self.rope_dim, heads * (self.still + self.value_dim)
        if m.q_lora_rank is None:
            self.w_q_QD = parameter((queries, cfg.d_model), initializer)
            self.q_norm = None
        else:
            self.w_q_RD = parameter((m.q_lora_rank, cfg.d_model), initializer)
            self.q_norm = RMSNorm(m.q_lora_rank, m.norm_eps)
            self.w_q_QR = parameter((queries, m.q_lora_rank), initializer)
        self.w_kv_PD = parameter((rows, cfg.d_model), initializer)
        self.kv_norm = RMSNorm(m.kv_lora_rank, m.norm_eps)
        self.w_kv_UL = parameter((made, m.kv_lora_rank), initializer)
        self.w_out_DO = parameter((cfg.d_model, heads * self.value_dim), initializer)

    def score_flops(self, keys: float) -> float:
        return 2 * self.heads.num_heads * (self.score_dim + self.value_dim) * keys

    def forward(self, x_BSD: Tensor, rope: Rope, plan: Plan, cache: LayerCache | None = None) -> Tensor:
        first = "w_q_QD" if self.q_norm is None else "w_q_RD"
        q, kv_BSP = linears_beside(x_BSD, self, [first, "w_kv_PD"])
        q_BNSH = self._queries(q, rope)
        latent_BSL, turning_BSr = kv_BSP.split([self.latent_dim, self.rope_dim], -1)
        latent_BSL = self.kv_norm(latent_BSL)
        turned_BS1r = apply_rope(turning_BSr[:, :, None], rope, self.interleaved)
        if cache is not None:
            latent_B1KL, turned_B1Kr = cache.append(latent_BSL[:, None], turned_BS1r.transpose(1, 2))
            latent_BSL, turned_BS1r = latent_B1KL[:, 0], turned_B1Kr.transpose(1, 2)
        k_BNKH, v_BNKH = self._keys_and_values(latent_BSL, turned_BS1r)
        out_BSNO = attend(q_BNSH, k_BNKH, v_BNKH, plan)[..., : self.value_dim]
        return linear_beside(out_BSNO.flatten(2), self, "w_out_DO")

    def _queries(self, q: Tensor, rope: Rope) -> Tensor:
        """[B, N, S, H] of the token's first product."""
        if self.q_norm is not None:
            q = linear_beside(self.q_norm(q), self, "w_q_QR")
        q_BSNH = q.unflatten(-1, (self.heads.num_heads, -1))
        still, turning = q_BSNH.split([self.still, self.rope_dim], -1)
        q_BSNH = torch.cat([still, apply_rope(turning, rope, self.interleaved)], -1)
        if self.score_factor != 1.0:
            q_BSNH = q_BSNH * self.score_factor
        return self._wide(q_BSNH).transpose(1, 2)

    def _keys_and_values(self, latent_BKL: Tensor, turned_BK1r: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, K, H] each."""
        made = linear_beside(latent_BKL, self, "w_kv_UL")
        still, v_BKNO = made.unflatten(-1, (self.heads.num_heads, -1)).split([self.still, self.value_dim], -1)
        turned = turned_BK1r.to(still.dtype).expand(-1, -1, self.heads.num_heads, -1)
        k_BKNH = torch.cat([still, turned], -1)
        return self._wide(k_BKNH).transpose(1, 2), self._wide(v_BKNO).transpose(1, 2)

    def _wide(self, x: Tensor) -> Tensor:
        missing = self.heads.head_dim - x.shape[-1]
        return F.pad(x, (0, missing)) if missing else x


def score_scale(scaling: RopeScaling) -> float:
    """What ``mscale_all_dim`` multiplies the scores by, as in the authors' code: (0.1 m ln(factor) + 1)^2."""
    if not scaling.mscale_all_dim:
        return 1.0
    return scaling.grown(scaling.mscale_all_dim) ** 2


@register_attention(LATENT, on_meta=True)
def _latent(cfg: ModelConfig, layer: int) -> AttentionLayer:
    return LatentAttention(cfg)
