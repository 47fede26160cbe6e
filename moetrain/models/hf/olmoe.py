"""OLMoE: queries and keys normalised over all heads at once (Muennighoff et al. 2024, arXiv:2409.02060)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moetrain.models.hf.family import Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.translate import (
    SHARED,
    read_decoder,
    read_experts,
    read_num_experts,
    read_topk,
    require,
    require_all_moe,
    write_decoder,
    write_topk,
)
from moetrain.models.options import QKNorm


def _read(fields: Fields) -> ModelSpec:
    fields.must_be("sliding_window", None)  # transformers hands it to some of its kernels
    width = fields.integer("intermediate_size")
    experts = read_num_experts(fields, "num_experts", "num_local_experts")
    model = read_decoder(fields, qk_norm=QKNorm.full, num_experts=experts, d_ff_expert=width)
    router = read_topk(fields, fields.flag("norm_topk_prob"))
    return ModelSpec(model, router, read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    require_all_moe(spec)
    require("model.sliding_window", spec.model.sliding_window, None)
    top_k, renormalized = write_topk(spec)
    as_dense = replace(spec, model=replace(spec.model, d_ff=spec.model.d_ff_expert))
    return write_decoder(as_dense, qk_norm=QKNorm.full) | {
        "attention_bias": False,
        "clip_qkv": None,
        "num_experts": spec.model.num_experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": renormalized,
    }


_DEFAULTS = SHARED | {
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-5,
}
register_family(Family("olmoe", "OlmoeForCausalLM", _read, _write, defaults=_DEFAULTS))
