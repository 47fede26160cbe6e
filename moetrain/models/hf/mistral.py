"""Mistral: Llama's shape with a sliding window (Jiang et al. 2023, arXiv:2310.06825)."""

from __future__ import annotations

from typing import Any

from moetrain.models.hf.family import Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.translate import read_decoder, read_experts, require_dense, write_decoder


def _read(fields: Fields) -> ModelSpec:
    model = read_decoder(fields, sliding_window=fields.integer_or_none("sliding_window"))
    return ModelSpec(model, experts=read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    require_dense(spec)
    return write_decoder(spec) | {"sliding_window": spec.model.sliding_window}


register_family(Family("mistral", "MistralForCausalLM", _read, _write))
