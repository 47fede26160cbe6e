"""Qwen3-MoE: many narrow experts, each head normalised (Yang et al. 2025, arXiv:2505.09388)."""

from __future__ import annotations

from typing import Any

from moetrain.config.schema import QKNorm
from moetrain.models.hf.family import CannotExpressError, Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.translate import (
    read_decoder,
    read_experts,
    read_sparse_layers,
    read_topk,
    require,
    write_decoder,
    write_sparse_layers,
    write_topk,
)


def _read(fields: Fields) -> ModelSpec:
    fields.must_be("attention_bias", False)
    count = "num_experts" if "num_experts" in fields.values else "num_local_experts"
    windowed = fields.flag("use_sliding_window", False)
    model = read_decoder(
        fields,
        qk_norm=QKNorm.head,
        sliding_window=fields.integer_or_none("sliding_window") if windowed else None,
        num_experts=fields.integer(count),
        d_ff_expert=fields.integer("moe_intermediate_size"),
        **read_sparse_layers(fields),
    )
    router = read_topk(fields, fields.flag("norm_topk_prob", False))
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


register_family(Family("qwen3_moe", "Qwen3MoeForCausalLM", _read, _write))
