"""Llama 2 and 3, and models of their shape, such as SmolLM2 (Touvron et al. 2023, arXiv:2307.09288)."""

from __future__ import annotations

from typing import Any

from moetrain.models.hf.family import Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.translate import (
    SHARED,
    read_decoder,
    read_experts,
    require,
    require_dense,
    write_decoder,
)


def _read(fields: Fields) -> ModelSpec:
    fields.without_effect("sliding_window", "use_sliding_window", "max_window_layers")  # not in this class
    biased = fields.flag("attention_bias")
    model = read_decoder(fields, qkv_bias=biased, out_bias=biased, mlp_bias=fields.flag("mlp_bias"))
    return ModelSpec(model, experts=read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    require_dense(spec)
    m = spec.model
    require("model.sliding_window", m.sliding_window, None)
    require("model.out_bias", m.out_bias, m.qkv_bias)
    written = write_decoder(spec, qkv_bias=m.qkv_bias, own=("out_bias", "mlp_bias"))
    return written | {"attention_bias": m.qkv_bias, "mlp_bias": m.mlp_bias}


_DEFAULTS = SHARED | {"attention_bias": False, "max_position_embeddings": 2048, "mlp_bias": False}
register_family(Family("llama", "LlamaForCausalLM", _read, _write, defaults=_DEFAULTS))
