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
    return ModelSpec(read_decoder(fields), experts=read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    require_dense(spec)
    require("model.sliding_window", spec.model.sliding_window, None)
    return write_decoder(spec) | {"attention_bias": False, "mlp_bias": False}


_DEFAULTS = SHARED | {"max_position_embeddings": 2048}
register_family(Family("llama", "LlamaForCausalLM", _read, _write, defaults=_DEFAULTS))
