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
    "self_attn.sinks": "attention.b_sink_N",
    "mlp.router.weight": "feed_forward.router.weight_ED",
    "mlp.router.bias": "feed_forward.router.logit_bias_E",
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
SANDWICH = {  # where what both halves give is normalised, too
    "post_attention_layernorm.weight": "attention_out_norm.weight_D",
    "pre_feedforward_layernorm.weight": "feed_forward_norm.weight_D",
    "post_feedforward_layernorm.weight": "feed_forward_out_norm.weight_D",
}
LATENT = {  # where keys and values are made of one vector
    "self_attn.q_proj.weight": "attention.w_q_QD",
    "self_attn.q_a_proj.weight": "attention.w_q_RD",
    "self_attn.q_a_layernorm.weight": "attention.q_norm.weight_D",
    "self_attn.q_b_proj.weight": "attention.w_q_QR",
    "self_attn.kv_a_proj_with_mqa.weight": "attention.w_kv_PD",
    "self_attn.kv_a_layernorm.weight": "attention.kv_norm.weight_D",
    "self_attn.kv_b_proj.weight": "attention.w_kv_UL",
    "self_attn.o_proj.weight": "attention.w_out_DO",
}
KEY_HEADS = 2  # of gated delta layers, which no shape of theirs tells
DELTA = {
    "linear_attn.conv1d.weight": "attention.conv.weight_C1W",
    "linear_attn.A_log": "attention.decay.a_log_N",
    "linear_attn.dt_bias": "attention.decay.b_dt_N",
    "linear_attn.norm.weight": "attention.norm.weight_D",
    "linear_attn.out_proj.weight": "attention.w_out_DY",
    "linear_attn.in_proj_z.weight": "attention.w_gate_YD",
    "linear_attn.in_proj_b.weight": "attention.w_beta_ND",
    "linear_attn.in_proj_a.weight": "attention.w_dt_ND",
}
RENAMED |= DELTA
FUSED = {f"linear_attn.in_proj_{parts}.weight" for parts in ("qkvz", "ba", "qkv")}
STACKED_UP, STACKED_DOWN = "experts.gate_up_proj", "experts.down_proj"
SHARED_UP = "shared_mlp.input_linear.weight"
_IN_TURN = {  # GPT-OSS's: [E, D, 2F], gate and up columns in turn
    f"mlp.{STACKED_UP}": "w_gate_up_EDCF",
    f"mlp.{STACKED_UP}_bias": "bias_gate_up_ECF",
    f"mlp.{STACKED_DOWN}": "w_down_EFD",
    f"mlp.{STACKED_DOWN}_bias": "bias_down_ED",
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
        renamed = RENAMED | LATENT if "self_attn.kv_b_proj.weight" in theirs else RENAMED
        renamed = renamed | SANDWICH if "pre_feedforward_layernorm.weight" in theirs else renamed
        parts = {renamed[name]: t for name, t in theirs.items() if name in renamed}
        used += len(parts)
        if f"mlp.{STACKED_UP}_bias" in theirs:
            for name, ours_name in _IN_TURN.items():
                parts[f"feed_forward.experts.{ours_name}"] = (
                    theirs[name].unflatten(-1, (-1, 2)).transpose(-1, -2)
                    if STACKED_UP in name
                    else theirs[name]
                )
            used += len(_IN_TURN)
        else:
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
        parts |= _hybrid(theirs)
        used += len(FUSED & theirs.keys())
        ours |= {f"blocks.{layer}.{name}": t for name, t in parts.items()}
    if used != len(tensors):
        raise ValueError(f"{len(tensors) - used} of the {len(tensors)} tensors have no place in this model")
    return ours


def _hybrid(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is stored in one matrix, of gated queries and of gated delta layers."""
    parts: dict[str, Tensor] = {}
    queries, out = (theirs.get(f"self_attn.{part}_proj.weight") for part in ("q", "o"))
    if queries is not None and out is not None and queries.shape[0] == 2 * out.shape[1]:
        width = len(theirs["self_attn.q_norm.weight"])
        both = queries.unflatten(0, (-1, 2, width))
        parts["attention.w_q_QD"], parts["attention.w_gate_QD"] = (both[:, i].flatten(0, 1) for i in (0, 1))
    if "linear_attn.A_log" not in theirs:
        return parts
    values = theirs["linear_attn.out_proj.weight"].shape[1]
    keys = (theirs["linear_attn.conv1d.weight"].shape[0] - values) // 2
    if "linear_attn.in_proj_qkv.weight" in theirs:
        split = theirs["linear_attn.in_proj_qkv.weight"].split([keys, keys, values])
        return parts | {f"attention.w_{x}": w for x, w in zip(("q_XD", "k_XD", "v_YD"), split, strict=True)}
    k, v = keys // KEY_HEADS, values // KEY_HEADS
    by_head = theirs["linear_attn.in_proj_qkvz.weight"].unflatten(0, (KEY_HEADS, -1)).split([k, k, v, v], 1)
    names = ("w_q_XD", "w_k_XD", "w_v_YD", "w_gate_YD")
    parts |= {f"attention.{x}": w.flatten(0, 1) for x, w in zip(names, by_head, strict=True)}
    small = theirs["linear_attn.in_proj_ba.weight"].unflatten(0, (KEY_HEADS, 2, -1))
    parts["attention.w_beta_ND"], parts["attention.w_dt_ND"] = (small[:, i].flatten(0, 1) for i in (0, 1))
    return parts
