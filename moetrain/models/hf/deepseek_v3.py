"""DeepSeek-V3, R1, Moonlight: latent attention, sigmoid scores (DeepSeek-AI 2024, arXiv:2412.19437)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moetrain.models.hf.family import Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.latent import DEFAULTS, NAMES, read_latent_decoder, write_latent_decoder
from moetrain.models.hf.scaled_topk import write_scaled
from moetrain.models.hf.translate import read_experts
from moetrain.moe.routers.sigmoid import SigmoidOptions
from moetrain.moe.routers.topk import GroupScore, Score

BIASED = replace(NAMES, bias="mlp.gate.e_score_correction_bias")


def read_v3(fields: Fields) -> ModelSpec:
    model = read_latent_decoder(
        fields, 3, "num_local_experts", rope_interleave=fields.flag("rope_interleave")
    )
    fields.must_be("scoring_func", "sigmoid")
    fields.must_be("topk_method", "noaux_tc")
    router = SigmoidOptions(
        top_k=fields.integer("num_experts_per_tok"),
        renormalize=fields.flag("norm_topk_prob"),
        route_scale=fields.number("routed_scaling_factor"),
        num_groups=fields.integer("n_group"),
        top_groups=fields.integer("topk_group"),
        group_score=GroupScore.top2,
    )
    return ModelSpec(model, router, read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    written = write_latent_decoder(spec)
    router, keys = write_scaled(spec, Score.sigmoid, GroupScore.top2)
    return written | {"n_group": 1, "topk_group": 1} | keys | {
        "rope_interleave": spec.model.latent.rope_interleave,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": router.renormalize,
    }  # fmt: skip


V3_DEFAULTS = DEFAULTS | {
    "first_k_dense_replace": 3,
    "max_position_embeddings": 4096,
    "n_group": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "rope_interleave": True,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
}
register_family(Family("deepseek_v3", "DeepseekV3ForCausalLM", read_v3, _write, BIASED, defaults=V3_DEFAULTS))
