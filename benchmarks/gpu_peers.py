"""Layers of other projects whose kernels need a GPU, in bf16 as they are made: pure_bf16 of ``peers.py``.

A package that is missing, or fails on this machine, is skipped with the reason. Written after their projects'
public interfaces; no run of them is recorded yet.

Shapes: T tokens, D model, F hidden, P = 2F, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peers import Routed, Shape, as_output, initialised
from torch import Tensor, nn


def liger(s: Shape) -> nn.Module:
    """Liger-Kernel's fused experts behind the router of ``Routed``."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def fused(
        x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w_gate_up_EPD: Tensor, w_down_EDF: Tensor
    ) -> Tensor:
        weights_TK = weights_TK.to(x_TD.dtype)
        return LigerFusedMoEFunction.apply(x_TD, w_gate_up_EPD, w_down_EDF, ids_TK.int(), weights_TK)

    return Routed(s, fused)


class _ScatterMoE(nn.Module):
    def __init__(self, s: Shape) -> None:
        from scattermoe.mlp import GLUMLP

        super().__init__()
        self.top_k = s.top_k
        self.router = nn.Linear(s.d_model, s.experts, bias=False)
        self.experts = GLUMLP(s.d_model, s.d_ff, s.experts, s.top_k, activation=nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        weights_TK, ids_TK = self.router(x_TD).float().softmax(-1).topk(self.top_k, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return self.experts(x_TD, weights_TK.to(x.dtype), ids_TK).view_as(x)


def scattermoe(s: Shape) -> nn.Module:
    return initialised(_ScatterMoE(s))


def sonicmoe(s: Shape) -> nn.Module:
    """SonicMoE's layer; its balance loss, which it always computes, is left out of the backward pass."""
    from sonicmoe import MoE
    from sonicmoe.enums import ActivationType

    layer = MoE(s.experts, s.top_k, s.d_model, s.d_ff, ActivationType.SWIGLU, add_bias=False, std=0.02)
    return as_output(layer)


def megablocks(s: Shape) -> nn.Module:
    """MegaBlocks' dropless layer, its balance loss off."""
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    options = Arguments(
        hidden_size=s.d_model,
        ffn_hidden_size=s.d_ff,
        moe_num_experts=s.experts,
        moe_top_k=s.top_k,
        moe_normalize_expert_weights=1,
        moe_loss_weight=0,
        mlp_type="glu",
        activation_fn=F.silu,
        bias=False,
        return_bias=False,
        fp16=False,
        bf16=True,
        device=torch.device("cuda"),
    )
    return as_output(dMoE(options))


GPU_LAYERS: dict[str, Callable[[Shape], nn.Module]] = {
    "Liger": liger,
    "ScatterMoE": scattermoe,
    "SonicMoE": sonicmoe,
    "MegaBlocks": megablocks,
}
