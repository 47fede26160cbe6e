"""Rotary embedding's keys, which Hugging Face writes in two ways: of transformers 5, and of before."""

from __future__ import annotations

from typing import Any

from moetrain.config.schema import ModelConfig
from moetrain.models.hf.fields import Fields


def read_rope(fields: Fields) -> dict[str, Any]:
    """The keys of ModelConfig that say how positions rotate."""
    values = fields.values.get("rope_parameters")
    if values is None:
        values = {"rope_theta": fields.number("rope_theta")} | (fields.values.get("rope_scaling") or {})
    kind = values.get("rope_type", values.get("type", "default"))
    if kind != "default":
        raise fields.refuse(f"rope_type={kind!r} is not supported")
    return {"rope_theta": float(values["rope_theta"])}


def write_rope(cfg: ModelConfig) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": cfg.rope_theta, "rope_type": "default"}}
