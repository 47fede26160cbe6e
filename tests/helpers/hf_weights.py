"""Hugging Face parameters of dense and MoE decoders in this project's names and layouts, for parity tests.

The mapping is linear, so it turns Hugging Face's gradients into ours as well.
Shapes: E experts, D model, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_PROJECTIONS = (("q", "Q"), ("k", "G"), ("v", "G"))
RENAMED = {
    "self_attn.o_proj.weight": "attention.w_out_DQ",
    "self_attn.query_layernorm.weight": "attention.q_norm.weight_D",
    "self_attn.key_layernorm.weight": "attention.k_norm.weight_D",
    "mlp.gate.wg.weight": "feed_forward.router.weight_ED",
    "mlp.shared_mlp.gate_proj.weight": "feed_forward.shared.w_gate_FD",
    "mlp.shared_mlp.up_proj.weight": "feed_forward.shared.w_up_FD",
    "mlp.shared_mlp.down_proj.weight": "feed_forward.shared.w_down_DF",
    "block_sparse_moe.router.weight": "feed_forward.router.weight_ED",
    "shared_mlp.output_linear.weight": "feed_forward.shared.w_down_DF",
    "self_attn.o_proj.bias": "attention.b_out_D",
    "self_attn.q_norm.weight": "attention.q_norm.weight_D",
    "self_attn.k_norm.weight": "attention.k_norm.weight_D",
    "input_layernorm.weight": "attention_norm.weight_D",
    "post_attention_layernorm.weight": "feed_forward_norm.weight_D",
    **{f"self_attn.{part}_proj.weight": f"attention.w_{part}_{axis}D" for part, axis in _PROJECTIONS},
    **{f"self_attn.{part}_proj.bias": f"attention.b_{part}_{axis}" for part, axis in _PROJECTIONS},
    "mlp.gate.weight": "feed_forward.router.weight_ED",
    **{f"mlp.{part}_proj.bias": f"feed_forward.b_{part}_F" for part in ("gate", "up")},
    "mlp.down_proj.bias": "feed_forward.b_down_D",
    "mlp.gate_proj.weight": "feed_forward.w_gate_FD",
    "mlp.up_proj.weight": "feed_forward.w_up_FD",
    "mlp.down_proj.weight": "feed_forward.w_down_DF",
    "mlp.shared_expert.gate_proj.weight": "feed_forward.shared.w_gate_FD",
    "mlp.shared_expert.up_proj.weight": "feed_forward.shared.w_up_FD",
    "mlp.shared_expert.down_proj.weight": "feed_forward.shared.w_down_DF",
    "mlp.shared_expert_gate.weight": "feed_forward.shared_gate_1D",
    "mlp.shared_experts.gate_proj.weight": "feed_forward.shared.w_gate_FD",
    "mlp.shared_experts.up_proj.weight": "feed_forward.shared.w_up_FD",
    "mlp.shared_experts.down_proj.weight": "feed_forward.shared.w_down_DF",
    "mlp.gate.e_score_correction_bias": "feed_forward.router.bias_E",
    "mlp.e_score_correction_bias": "feed_forward.router.bias_E",
    "mlp.gate.moe_statics.e_score_correction_bias": "feed_forward.router.bias_E",
}
STACKED_UP, STACKED_DOWN = "experts.gate_up_proj", "experts.down_proj"
SHARED_UP = "shared_mlp.input_linear.weight"
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
        used += len(parts)
        for block in ("mlp", "block_sparse_moe"):
            if (up := f"{block}.{STACKED_UP}") in theirs:  # [E, 2F, D], the gate's rows first
                up_EDCF = theirs[up].transpose(1, 2).unflatten(2, (2, -1))
                down_EFD = theirs[f"{block}.{STACKED_DOWN}"].transpose(1, 2)
                parts["feed_forward.experts.w_gate_up_EDCF"] = up_EDCF
                parts["feed_forward.experts.w_down_EFD"] = down_EFD
                used += 2
        if SHARED_UP in theirs:  # the gate's rows first
            halves = theirs[SHARED_UP].chunk(2)
            parts["feed_forward.shared.w_gate_FD"], parts["feed_forward.shared.w_up_FD"] = halves
            used += 1
        ours |= {f"blocks.{layer}.{name}": t for name, t in parts.items()}
    if used != len(tensors):
        raise ValueError(f"{len(tensors) - used} of the {len(tensors)} tensors have no place in this model")
    return ours
