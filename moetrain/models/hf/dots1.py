"""dots.llm1: DeepSeek-V3's MoE layers with Qwen3's attention (Huo et al. 2025, arXiv:2506.05767)."""

from __future__ import annotations

from typing import Any

from moetrain.models.hf.family import Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.sigmoid_moe import NAMES, read_layers, read_router, write_layers, write_router
from moetrain.models.hf.translate import (
    SHARED,
    read_decoder,
    read_experts,
    require,
    window,
    window_or_none,
    write_decoder,
    write_window,
)
from moetrain.models.options import QKNorm


def _read(fields: Fields) -> ModelSpec:
    fields.without_effect("auto_map")  # code beside the weights, where transformers has its own
    biased = fields.flag("attention_bias")
    model = read_decoder(
        fields,
        qk_norm=QKNorm.head,
        qkv_bias=biased,
        out_bias=biased,
        sliding_window=window_or_none(fields, on=window(fields) is not None),
        **read_layers(fields),
    )
    return ModelSpec(model, read_router(fields), read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    m = spec.model
    require("model.out_bias", m.out_bias, m.qkv_bias)
    written = write_decoder(spec, QKNorm.head, m.qkv_bias, own=("out_bias",)) | write_window(m)
    del written["use_sliding_window"]  # a width is enough
    return written | write_layers(m) | write_router(spec) | {"attention_bias": m.qkv_bias}


_DEFAULTS = SHARED | {
    "attention_bias": False,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 2048,
    "max_window_layers": 62,
    "n_group": 1,
    "norm_topk_prob": False,
    "num_key_value_heads": 32,
    "routed_scaling_factor": 1.0,
    "sliding_window": 4096,
    "topk_group": 1,
}
register_family(Family("dots1", "Dots1ForCausalLM", _read, _write, NAMES, defaults=_DEFAULTS))
