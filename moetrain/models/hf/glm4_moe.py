"""GLM-4.5: the first half of each head turns, sigmoid router, shared expert (GLM-4.5 Team 2025,
arXiv:2508.06471).
"""

from __future__ import annotations

from typing import Any

from moetrain.models.hf.family import Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.further import BY_PLACE
from moetrain.models.hf.sigmoid_moe import NAMES, read_layers, read_router, write_layers, write_router
from moetrain.models.hf.translate import SHARED, read_decoder, read_experts, require, write_decoder
from moetrain.models.options import QKNorm

_FUTURE = "num_nextn_predict_layers"  # layers after the last, which predict further tokens


def _read(fields: Fields) -> ModelSpec:
    model = read_decoder(
        fields,
        partial_rope=0.5,
        qk_norm=QKNorm.head if fields.flag("use_qk_norm") else QKNorm.none,
        qkv_bias=fields.flag("attention_bias"),
        **read_layers(fields),
    )
    return ModelSpec(model, read_router(fields), read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    m = spec.model
    require("model.sliding_window", m.sliding_window, None)
    qk_norm = QKNorm.head if m.qk_norm is QKNorm.head else QKNorm.none
    written = write_decoder(spec, qk_norm, m.qkv_bias, own=("rope_fraction",))
    written["rope_parameters"]["partial_rotary_factor"] = m.rope_fraction  # absent, it would be a half
    return written | write_layers(m) | write_router(spec) | {
        "use_qk_norm": qk_norm is QKNorm.head,
        "attention_bias": m.qkv_bias,
    }  # fmt: skip


_DEFAULTS = SHARED | {
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "use_qk_norm": False,
}
register_family(
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        _read,
        _write,
        NAMES,
        defaults=_DEFAULTS,
        future_layers=_FUTURE,
        further=BY_PLACE,
    )
)
