"""Qwen3-MoE: many narrow experts, each head normalised (Yang et al. 2025, arXiv:2505.09388)."""

from __future__ import annotations

from typing import Any

from moetrain.models.hf.family import CannotExpressError, Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.translate import (
    SHARED,
    read_decoder,
    read_experts,
    read_num_experts,
    read_sparse_layers,
    read_topk,
    require,
    window,
    write_decoder,
    write_sparse_layers,
    write_topk,
)
from moetrain.models.options import QKNorm


def _read(fields: Fields) -> ModelSpec:
    windowed = fields.flag("use_sliding_window", False)
    fields.without_effect("sliding_window", "max_window_layers")  # the latter is not in this class
    model = read_decoder(
        fields,
        qk_norm=QKNorm.head,
        sliding_window=window(fields) if windowed else None,
        num_experts=read_num_experts(fields, "num_experts", "num_local_experts"),
        d_ff_expert=fields.integer("moe_intermediate_size"),
        **read_sparse_layers(fields),
    )
    router = read_topk(fields, fields.flag("norm_topk_prob"))
    return ModelSpec(model, router, read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    m = spec.model
    if not m.num_experts:
        raise CannotExpressError("model.num_experts=0, and it has experts")
    require("model.num_shared_experts", m.num_shared_experts, 0)
    top_k, renormalized = write_topk(spec)
    return write_decoder(spec, qk_norm=QKNorm.head) | write_sparse_layers(m) | {
        "attention_bias": False,
        "num_experts": m.num_experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": renormalized,
        "moe_intermediate_size": m.d_ff_expert,
        "use_sliding_window": m.sliding_window is not None,
        "sliding_window": m.sliding_window,
    }  # fmt: skip


_DEFAULTS = SHARED | {
    "decoder_sparse_step": 1,
    "max_position_embeddings": 32768,
    "norm_topk_prob": False,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "use_sliding_window": False,
}
register_family(Family("qwen3_moe", "Qwen3MoeForCausalLM", _read, _write, defaults=_DEFAULTS))
