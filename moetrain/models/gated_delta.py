"""The attention ``gated_delta``: a matrix of state a head instead of keys and values of all tokens.

Queries, keys and values pass a short causal convolution; the state follows the gated delta rule
(``ops/delta_rule.py``); the output is normalised by heads and gated. Documents share neither state nor
convolution. Positions turn nothing: the order is in the recurrence.

Shapes: B batch, S sequence, D model, J key heads, K their width, N value heads, V their width, W taps of the
convolution. In weights X stands for J times K and Y for N times V; C = 2 X + Y.

Sources: Yang et al. 2024, "Gated Delta Networks", arXiv:2412.06464; as Qwen3-Next has it (Qwen team 2025).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.models.attention import AttentionLayer, register_attention
from moetrain.models.cache import LayerCache
from moetrain.models.norm import RMSNorm
from moetrain.models.options import ModelConfig
from moetrain.models.rope import Rope
from moetrain.ops.attention import Plan
from moetrain.ops.delta_rule import chunked_delta_rule, recurrent_delta_rule, runs_of
from moetrain.ops.init import Normal, Uniform, parameter
from moetrain.ops.low_rank import linear_beside, linears_beside

_STATE, _INPUTS = "gated_delta.state", "gated_delta.inputs"  # in a cache's memory
_EPS = 1e-6  # under the root of a query's and a key's length


class ShortConvolution(nn.Module):
    """Each channel by itself, over a token and those before it in its document; no bias."""

    keeps_own_init = True  # as torch's own convolution starts, in variance
    no_matrices = True  # for optimizers its weights are vectors

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight_C1W = parameter((channels, 1, width), Normal((3 * width) ** -0.5))

    def forward(self, x_BSC: Tensor, runs_BS: Tensor | None, before_BPC: Tensor | None) -> Tensor:
        """``before_BPC``: the last W - 1 inputs of earlier calls; None: there were none."""
        seq, taps_CW = x_BSC.shape[1], self.weight_C1W[:, 0]
        back = taps_CW.shape[1] - 1
        inputs_BTC = (
            F.pad(x_BSC, (0, 0, back, 0)) if before_BPC is None else torch.cat([before_BPC, x_BSC], 1)
        )
        if runs_BS is not None:
            runs_BT = F.pad(runs_BS, (back, 0))
        y_BSC = inputs_BTC[:, back:] * taps_CW[:, back]
        for tap in range(back):
            seen_BSC = inputs_BTC[:, tap : tap + seq]
            if runs_BS is not None:
                seen_BSC = seen_BSC * (runs_BT[:, tap : tap + seq] == runs_BS)[..., None]
            y_BSC = y_BSC + seen_BSC * taps_CW[:, tap]
        return y_BSC


class Decay(nn.Module):
    """g = -exp(a) softplus(dt + bias), the logarithm of what a token leaves of the state.

    At the start exp(a) is uniform up to 16, and softplus(bias) about log-uniform from 0.001 to 0.1, as in the
    authors' code.
    """

    keeps_own_init = True

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.a_log_N = parameter((heads,), Uniform(0.01, 16.0, log=True))
        self.b_dt_N = parameter((heads,), Uniform(-6.9, -2.3))

    def forward(self, dt_BSN: Tensor) -> Tensor:
        return -self.a_log_N.to(dt_BSN.dtype).exp() * F.softplus(dt_BSN + self.b_dt_N.to(dt_BSN.dtype))


class GatedDelta(AttentionLayer):
    """The layer; its products run in x's dtype, the recurrence in fp32 at least."""

    takes_low_rank = ("w_q_XD", "w_k_XD", "w_v_YD", "w_gate_YD", "w_beta_ND", "w_dt_ND", "w_out_DY")

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        options, normal = cfg.gated_delta, Normal(cfg.init_std)
        self.heads, self.rope_dim = None, 0
        self.key_heads, self.value_heads = options.num_key_heads, options.num_value_heads
        self.key_dim, self.value_dim = options.key_head_dim, options.value_head_dim
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        self.widths = [keys, keys, values]
        self.w_q_XD = parameter((keys, cfg.d_model), normal)
        self.w_k_XD = parameter((keys, cfg.d_model), normal)
        self.w_v_YD = parameter((values, cfg.d_model), normal)
        self.w_gate_YD = parameter((values, cfg.d_model), normal)
        self.w_beta_ND = parameter((self.value_heads, cfg.d_model), normal)
        self.w_dt_ND = parameter((self.value_heads, cfg.d_model), normal)
        self.conv = ShortConvolution(sum(self.widths), options.conv_width)
        self.decay = Decay(self.value_heads)
        self.norm = RMSNorm(self.value_dim, cfg.norm_eps)
        self.w_out_DY = parameter((cfg.d_model, values), normal)

    def forward(self, x_BSD: Tensor, rope: Rope, plan: Plan, cache: LayerCache | None = None) -> Tensor:
        docs_BS = None if plan.seen is None else plan.seen.doc_ids_BS
        runs_BS = None if docs_BS is None else runs_of(docs_BS)
        *inner, out = self.takes_low_rank
        *qkv, gate_BSY, beta_BSN, dt_BSN = linears_beside(x_BSD, self, inner)
        q_BSX, k_BSX, v_BSY = self._convolved(torch.cat(qkv, -1), runs_BS, cache)
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        q_BSNK, k_BSNK = self._unit(q_BSX.to(wide)), self._unit(k_BSX.to(wide))
        v_BSNV = v_BSY.to(wide).unflatten(-1, (self.value_heads, self.value_dim))
        inputs = (q_BSNK * self.key_dim**-0.5, k_BSNK, v_BSNV)
        gates = (self.decay(dt_BSN.to(wide)), beta_BSN.to(wide).sigmoid())
        if cache is None:
            y_BSNV, _ = chunked_delta_rule(*inputs, *gates, runs_BS)
        else:
            cache.advance(x_BSD.shape[1])
            rule = recurrent_delta_rule if x_BSD.shape[1] == 1 else chunked_delta_rule
            y_BSNV, cache.memory[_STATE] = rule(*inputs, *gates, runs_BS, cache.memory.get(_STATE))
        y_BSY = self.norm(y_BSNV, wide).flatten(2) * F.silu(gate_BSY.to(wide))
        return linear_beside(y_BSY.to(x_BSD.dtype), self, out)

    def _convolved(
        self, x_BSC: Tensor, runs_BS: Tensor | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        before_BPC = None if cache is None else cache.memory.get(_INPUTS)
        y_BSC = F.silu(self.conv(x_BSC, runs_BS, before_BPC))
        if cache is not None:
            back = self.conv.weight_C1W.shape[2] - 1
            if before_BPC is None:
                before_BPC = x_BSC.new_zeros(x_BSC.shape[0], back, x_BSC.shape[2])
            joined_BTC = torch.cat([before_BPC, x_BSC], 1)
            cache.memory[_INPUTS] = joined_BTC[:, joined_BTC.shape[1] - back :]
        q_BSX, k_BSX, v_BSY = y_BSC.split(self.widths, -1)
        return q_BSX, k_BSX, v_BSY

    def _unit(self, x_BSX: Tensor) -> Tensor:
        """By heads, each of length one; a key head serves consecutive value heads."""
        x_BSJK: Tensor = x_BSX.unflatten(-1, (self.key_heads, self.key_dim))
        x_BSJK = x_BSJK * (x_BSJK.square().sum(-1, keepdim=True) + _EPS).rsqrt()
        return x_BSJK.repeat_interleave(self.value_heads // self.key_heads, 2)

    def score_flops(self, keys: float) -> float:
        """Of the recurrence: reading the state by key and by query, and adding to it."""
        return 2 * 3 * self.value_heads * self.key_dim * self.value_dim


@register_attention("gated_delta", on_meta=True)
def _gated_delta(cfg: ModelConfig, layer: int) -> AttentionLayer:
    return GatedDelta(cfg)
