"""A plug-in layer without dispatch: ``plugins=[soft_merging]``, ``model.feed_forward=soft_merging``.

The experts' weights are averaged by a sequence's mean gate, and each sequence passes its one merged network
(Muqeeth et al. 2023, arXiv:2306.03745). The mean looks at later tokens, so this is no causal language model.

Shapes: B batch, S sequence, T = B S tokens, D model, F hidden, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.models.feed_forward import register_feed_forward
from moetrain.models.options import ModelConfig
from moetrain.moe import RouterContext, Routing
from moetrain.moe.assign import from_mask
from moetrain.moe.options import ExpertsConfig, RouterConfig
from moetrain.ops.init import Normal, parameter


class SoftMerging(nn.Module):
    """The record says what every token used: all experts, by its sequence's gate."""

    def __init__(self, d_model: int, d_ff: int, num_experts: int) -> None:
        super().__init__()
        self.gate_ED = parameter((num_experts, d_model), Normal(d_model**-0.5))
        self.up_EDF = parameter((num_experts, d_model, d_ff), Normal(d_model**-0.5))
        self.down_EFD = parameter((num_experts, d_ff, d_model), Normal(0.1 * d_ff**-0.5))

    def forward(self, x_BSD: Tensor, ctx: RouterContext) -> tuple[Tensor, Routing]:
        batch, seq, _ = x_BSD.shape
        logits_BSE = F.linear(x_BSD, self.gate_ED)
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        scores_BSE = logits_BSE.to(wide).softmax(-1)
        valid_BS = torch.ones_like(x_BSD[..., 0]) if ctx.valid_T is None else ctx.valid_T.view(batch, seq)
        tokens_B1 = valid_BS.sum(1, keepdim=True).clamp(min=1)
        mean_BE = (scores_BSE * valid_BS[..., None]).sum(1) / tokens_B1
        up_BDF, down_BFD = (
            torch.einsum("be,exy->bxy", mean_BE.to(w.dtype), w) for w in (self.up_EDF, self.down_EFD)
        )
        y_BSD = F.silu(x_BSD @ up_BDF) @ down_BFD
        scores_TE, logits_TE = scores_BSE.flatten(0, 1), logits_BSE.to(wide).flatten(0, 1)
        weights_TE = mean_BE.repeat_interleave(seq, 0)
        every_TE = torch.ones_like(weights_TE, dtype=torch.bool)
        return y_BSD, from_mask(every_TE, weights_TE, ctx, scores_TE, logits_TE)


@register_feed_forward("soft_merging", on_meta=True)
def build(cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> nn.Module:
    return SoftMerging(cfg.d_model, cfg.d_ff_expert, cfg.num_experts)
