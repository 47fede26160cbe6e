"""Qwen1.5-MoE and Qwen2-MoE: a shared expert behind a gate (Yang et al. 2024, arXiv:2407.10671)."""

from __future__ import annotations

from typing import Any

from moetrain.models.hf.family import CannotExpressError, Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.translate import (
    SHARED,
    layer_types,
    read_decoder,
    read_experts,
    read_sparse_layers,
    read_topk,
    require,
    window_or_none,
    write_decoder,
    write_sparse_layers,
    write_topk,
    write_window,
)


def _read(fields: Fields) -> ModelSpec:
    if fields.flag("use_sliding_window") and layer_types(fields) is None:
        raise fields.refuse(
            "use_sliding_window without layer_types: transformers 4 and 5 disagree on which layers have it"
        )
    model = read_decoder(
        fields,
        qkv_bias=fields.flag("qkv_bias"),
        sliding_window=window_or_none(fields),
        num_experts=fields.integer("num_experts"),
        d_ff_expert=fields.integer("moe_intermediate_size"),
        num_shared_experts=1,
        d_ff_shared=fields.integer("shared_expert_intermediate_size"),
        shared_gate=True,
        **read_sparse_layers(fields),
    )
    router = read_topk(fields, fields.flag("norm_topk_prob"))
    return ModelSpec(model, router, read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    m = spec.model
    if not m.num_experts:
        raise CannotExpressError("model.num_experts=0, and it has experts")
    if not m.num_shared_experts:
        raise CannotExpressError("model.num_shared_experts=0, and it has a shared expert")
    require("model.shared_gate", m.shared_gate, True)
    top_k, renormalized = write_topk(spec)
    written = write_decoder(spec, qkv_bias=m.qkv_bias)
    return written | write_window(m) | write_sparse_layers(m) | {
        "qkv_bias": m.qkv_bias,
        "num_experts": m.num_experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": renormalized,
        "moe_intermediate_size": m.d_ff_expert,
        "shared_expert_intermediate_size": m.shared_width,
    }  # fmt: skip


_DEFAULTS = SHARED | {
    "decoder_sparse_step": 1,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "norm_topk_prob": False,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 16,
    "qkv_bias": True,
    "sliding_window": 4096,
    "use_sliding_window": False,
}
register_family(Family("qwen2_moe", "Qwen2MoeForCausalLM", _read, _write, defaults=_DEFAULTS))
