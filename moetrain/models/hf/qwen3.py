"""Qwen3, dense: each head of queries and keys is normalised (Yang et al. 2025, arXiv:2505.09388)."""

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
from moetrain.models.options import QKNorm


def _read(fields: Fields) -> ModelSpec:
    model = read_decoder(fields, qk_norm=QKNorm.head, sliding_window=window_or_none(fields))
    return ModelSpec(model, experts=read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    require_dense(spec)
    own = {"attention_bias": False} | write_window(spec.model)
    return write_decoder(spec, qk_norm=QKNorm.head) | own


_DEFAULTS = SHARED | {
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "head_dim": 128,
}
register_family(Family("qwen3", "Qwen3ForCausalLM", _read, _write, defaults=_DEFAULTS))
