"""Qwen2 and Qwen2.5: biases on queries, keys and values (Yang et al. 2024, arXiv:2407.10671)."""

from __future__ import annotations

from typing import Any

from moetrain.models.hf.family import Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.translate import (
    SHARED,
    read_decoder,
    read_experts,
    require_dense,
    window_or_none,
    write_decoder,
    write_window,
)


def _read(fields: Fields) -> ModelSpec:
    model = read_decoder(fields, qkv_bias=True, sliding_window=window_or_none(fields))
    return ModelSpec(model, experts=read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    require_dense(spec)
    return write_decoder(spec, qkv_bias=True) | write_window(spec.model)


_DEFAULTS = SHARED | {
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
}
register_family(Family("qwen2", "Qwen2ForCausalLM", _read, _write, defaults=_DEFAULTS))
