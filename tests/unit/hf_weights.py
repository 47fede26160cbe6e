"""Hugging Face parameters of dense and MoE decoders in this project's names and layouts, for parity tests.

The mapping is linear, so it turns Hugging Face's gradients into ours as well.
Shapes: E experts, D model, F expert hidden, P columns of the joint projection of queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

RENAMED = {
    "self_attn.o_proj.weight": "attention.w_out_DQ",
    "self_attn.q_norm.weight": "attention.q_norm.weight_D",
    "self_attn.k_norm.weight": "attention.k_norm.weight_D",
    "input_layernorm.weight": "attention_norm.weight_D",
    "post_attention_layernorm.weight": "feed_forward_norm.weight_D",
    "mlp.gate.weight": "feed_forward.router.weight_ED",
    "mlp.down_proj.weight": "feed_forward.w_down_DF",
    "mlp.shared_expert.down_proj.weight": "feed_forward.shared.w_down_DF",
    "mlp.shared_expert_gate.weight": "feed_forward.shared_gate_1D",
}
TRANSPOSED = {
    "mlp.experts.gate_up_proj": "feed_forward.experts.w_gate_up_EDF2",
    "mlp.experts.down_proj": "feed_forward.experts.w_down_EFD",
}
JOINED = {
    "attention.w_qkv_PD": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "attention.b_qkv_P": [f"self_attn.{part}_proj.bias" for part in "qkv"],
    "feed_forward.w_gate_up_PD": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "feed_forward.shared.w_gate_up_PD": [f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up")],
}
OUTER = {
    "model.embed_tokens.weight": "embed_VD",
    "model.norm.weight": "norm.weight_D",
    "lm_head.weight": "head_VD",
}


def from_hf(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours, by name, of Hugging Face parameters (or their gradients). Every name must be known."""
    ours = {OUTER[name]: tensor for name, tensor in tensors.items() if name in OUTER}
    used = len(ours)
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
    for layer in layers:
        start = f"model.layers.{layer}."
        theirs = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
        parts = {RENAMED[name]: t for name, t in theirs.items() if name in RENAMED}
        parts |= {TRANSPOSED[name]: t.transpose(1, 2) for name, t in theirs.items() if name in TRANSPOSED}
        for name, pieces in JOINED.items():
            if pieces[0] in theirs:
                parts[name] = torch.cat([theirs[piece] for piece in pieces])
                used += len(pieces) - 1
        used += len(parts)
        ours |= {f"blocks.{layer}.{name}": t for name, t in parts.items()}
    if used != len(tensors):
        raise ValueError(f"{len(tensors) - used} of the {len(tensors)} tensors have no place in this model")
    return ours
