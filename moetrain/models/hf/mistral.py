"""Mistral: Llama's shape with a sliding window (Jiang et al. 2023, arXiv:2310.06825)."""

from __future__ import annotations

from typing import Any

from moetrain.models.hf.family import Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.translate import (
    SHARED,
    read_decoder,
    read_experts,
    require_dense,
    window,
    write_decoder,
)


def _read(fields: Fields) -> ModelSpec:
    model = read_decoder(fields, sliding_window=window(fields))
    return ModelSpec(model, experts=read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    require_dense(spec)
    return write_decoder(spec) | {"sliding_window": spec.model.sliding_window}


_DEFAULTS = SHARED | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
register_family(Family("mistral", "MistralForCausalLM", _read, _write, defaults=_DEFAULTS))
