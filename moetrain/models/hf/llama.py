"""Llama 2 and 3, and models of their shape, such as SmolLM2 (Touvron et al. 2023, arXiv:2307.09288)."""

from __future__ import annotations

from typing import Any

from moetrain.models.hf.family import Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.translate import read_decoder, read_experts, require, require_dense, write_decoder


def _read(fields: Fields) -> ModelSpec:
    for key in ("attention_bias", "mlp_bias"):
        fields.must_be(key, False)
    return ModelSpec(read_decoder(fields), experts=read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    require_dense(spec)
    require("model.sliding_window", spec.model.sliding_window, None)
    return write_decoder(spec) | {"attention_bias": False, "mlp_bias": False}


register_family(Family("llama", "LlamaForCausalLM", _read, _write))
