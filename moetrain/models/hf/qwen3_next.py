"""Qwen3-Next: gated delta layers, every fourth of gated attention; many experts, a shared one behind a gate
(Qwen team 2025; the layer: Yang et al. 2024, arXiv:2412.06464).
"""

from __future__ import annotations

from typing import Any

from moetrain.models.hf.family import CannotExpressError, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.hybrid import (
    DEFAULTS,
    FURTHER,
    LEFT_OUT,
    HybridFamily,
    read_hybrid,
    stacked,
    write_hybrid,
)
from moetrain.models.hf.pieces import Table
from moetrain.models.hf.translate import (
    read_experts,
    read_num_experts,
    read_sparse_layers,
    read_topk,
    require,
    write_sparse_layers,
    write_topk,
)
from moetrain.models.options import ModelConfig


def read_moe(fields: Fields) -> dict[str, Any]:
    """Routed experts and the shared one."""
    return {
        "num_experts": read_num_experts(fields, "num_experts", "num_local_experts"),
        "d_ff_expert": fields.integer("moe_intermediate_size"),
        "num_shared_experts": 1,
        "d_ff_shared": fields.integer("shared_expert_intermediate_size"),
        "shared_gate": True,
    }


def write_moe(m: ModelConfig) -> dict[str, Any]:
    """The inverse of :func:`read_moe`. Raises CannotExpressError for other layers."""
    if not m.num_experts:
        raise CannotExpressError("model.num_experts=0, and it has experts")
    if not m.num_shared_experts:
        raise CannotExpressError("model.num_shared_experts=0, and it has a shared expert")
    require("model.shared_gate", m.shared_gate, True)
    return {
        "num_experts": m.num_experts,
        "moe_intermediate_size": m.d_ff_expert,
        "shared_expert_intermediate_size": m.shared_width,
    }


def _read(fields: Fields) -> ModelSpec:
    model = read_hybrid(fields, **read_moe(fields), **read_sparse_layers(fields))
    return ModelSpec(model, read_topk(fields, fields.flag("norm_topk_prob")), read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    written = write_moe(spec.model)
    top_k, renormalized = write_topk(spec)
    return write_hybrid(spec) | write_sparse_layers(spec.model) | written | {
        "num_experts_per_tok": top_k,
        "norm_topk_prob": renormalized,
    }  # fmt: skip


def _projections(m: ModelConfig) -> Table:
    """Of each key head its queries, keys, values and gates, one after the other; so beta and dt."""
    d = m.gated_delta
    heads = d.num_value_heads // d.num_key_heads
    values = heads * d.value_head_dim
    large = {"w_q_XD": d.key_head_dim, "w_k_XD": d.key_head_dim, "w_v_YD": values, "w_gate_YD": values}
    small = {"w_beta_ND": heads, "w_dt_ND": heads}
    return {
        **stacked("in_proj_qkvz.weight", large, d.num_key_heads, m.d_model),
        **stacked("in_proj_ba.weight", small, d.num_key_heads, m.d_model),
    }


_DEFAULTS = DEFAULTS | {
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 10,
}
register_family(
    HybridFamily(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        _read,
        _write,
        defaults=_DEFAULTS,
        left_out=LEFT_OUT,
        further=FURTHER,
        projections=_projections,
    )
)
