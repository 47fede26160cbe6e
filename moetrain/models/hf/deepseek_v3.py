"""DeepSeek-V3, R1, Moonlight: latent attention, sigmoid scores (DeepSeek-AI 2024, arXiv:2412.19437)."""

from __future__ import annotations

from typing import Any

from moetrain.models.hf.family import Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.further import BY_PLACE
from moetrain.models.hf.latent import DEFAULTS, FUTURE, read_latent_decoder, write_latent_decoder
from moetrain.models.hf.sigmoid_moe import NAMES, read_layers, read_router, write_layers, write_router
from moetrain.models.hf.translate import read_experts


def read_v3(fields: Fields) -> ModelSpec:
    """A config.json of DeepSeek-V3's keys, whatever its ``model_type`` is."""
    interleaved = fields.flag("rope_interleave")
    model = read_latent_decoder(fields, 3, interleaved, **read_layers(fields))
    fields.must_be("scoring_func", "sigmoid")
    fields.must_be("topk_method", "noaux_tc")
    return ModelSpec(model, read_router(fields), read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    return write_latent_decoder(spec) | write_layers(spec.model) | write_router(spec) | {
        "rope_interleave": spec.model.rope_interleaved,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
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
register_family(
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        read_v3,
        _write,
        NAMES,
        defaults=V3_DEFAULTS,
        future_layers=FUTURE,
        further=BY_PLACE,
    )
)
