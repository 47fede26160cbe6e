"""Mixtral: every layer MoE, softmax over the chosen experts (Jiang et al. 2024, arXiv:2401.04088)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moetrain.models.hf.family import CannotExpressError, Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.tables import MoENames
from moetrain.models.hf.translate import (
    SHARED,
    read_decoder,
    read_experts,
    read_num_experts,
    require_all_moe,
    window,
    write_decoder,
    write_topk,
)
from moetrain.moe.routers.topk import Score, TopKOptions

NAMES = MoENames(
    router="block_sparse_moe.gate.weight",
    gate="block_sparse_moe.experts.{}.w1.weight",
    up="block_sparse_moe.experts.{}.w3.weight",
    down="block_sparse_moe.experts.{}.w2.weight",
)


def _read(fields: Fields) -> ModelSpec:
    width = fields.integer("intermediate_size")
    experts = read_num_experts(fields, "num_local_experts", "num_experts")
    model = read_decoder(fields, num_experts=experts, d_ff_expert=width, sliding_window=window(fields))
    router = TopKOptions(
        top_k=fields.integer("num_experts_per_tok"),
        score=Score.softmax_after,
        jitter=fields.number("router_jitter_noise") if fields.get("router_jitter_noise") else 0.0,
    )
    return ModelSpec(model, router, read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    require_all_moe(spec)
    top_k, renormalized = write_topk(spec)
    if not renormalized:
        raise CannotExpressError("router.renormalize=false, and its weights sum to 1")
    assert isinstance(spec.router, TopKOptions)  # write_topk refuses any other
    as_dense = replace(spec, model=replace(spec.model, d_ff=spec.model.d_ff_expert))
    return write_decoder(as_dense) | {
        "num_local_experts": spec.model.num_experts,
        "num_experts_per_tok": top_k,
        "sliding_window": spec.model.sliding_window,
        "router_jitter_noise": spec.router.jitter,
    }


_DEFAULTS = SHARED | {
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
}
register_family(Family("mixtral", "MixtralForCausalLM", _read, _write, NAMES, defaults=_DEFAULTS))
