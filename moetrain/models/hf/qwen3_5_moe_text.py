"""Qwen3.5-MoE, its language model: Qwen3-Next's layers, all of them MoE, projections stored apart
(Qwen team 2026).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moetrain.models.hf.family import ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.hybrid import (
    DEFAULTS,
    FURTHER,
    LEFT_OUT,
    HybridFamily,
    read_hybrid,
    stacked,
    whole,
    write_hybrid,
)
from moetrain.models.hf.pieces import Table
from moetrain.models.hf.qwen3_next import read_moe, write_moe
from moetrain.models.hf.translate import read_experts, read_topk, require, require_all_moe, write_topk
from moetrain.models.options import ModelConfig


def _read(fields: Fields) -> ModelSpec:
    experts = read_moe(fields)
    fields.without_effect("intermediate_size")  # no layer is dense
    model = read_hybrid(fields, d_ff=experts["d_ff_expert"], **experts)
    return ModelSpec(model, read_topk(fields, renormalize=True), read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    require_all_moe(spec, shared=True)
    written = write_moe(spec.model)
    top_k, renormalized = write_topk(spec)
    require("router.renormalize", renormalized, True)
    decoder = write_hybrid(spec)
    del decoder["intermediate_size"]
    return decoder | written | {"num_experts_per_tok": top_k}


def projections(m: ModelConfig) -> Table:
    d = m.gated_delta
    keys, values = d.num_key_heads * d.key_head_dim, d.num_value_heads * d.value_head_dim
    return {
        **stacked("in_proj_qkv.weight", {"w_q_XD": keys, "w_k_XD": keys, "w_v_YD": values}, 1, m.d_model),
        "w_gate_YD": whole("in_proj_z.weight", (values, m.d_model)),
        "w_beta_ND": whole("in_proj_b.weight", (d.num_value_heads, m.d_model)),
        "w_dt_ND": whole("in_proj_a.weight", (d.num_value_heads, m.d_model)),
    }


register_family(
    HybridFamily(
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        _read,
        _write,
        defaults=DEFAULTS | {"num_experts_per_tok": 8},
        left_out=LEFT_OUT,
        further=replace(FURTHER, key="mtp_num_hidden_layers"),
        projections=projections,
    )
)
