"""Rotary embedding's keys, which Hugging Face writes in two ways: transformers 5's, and the older one."""

from __future__ import annotations

from typing import Any

from moetrain.config.schema import ModelConfig
from moetrain.config.schema_rope import RopeKind, RopeScaling
from moetrain.models.hf.fields import Fields

_KINDS = {
    "default": RopeKind.none,
    "linear": RopeKind.linear,
    "llama3": RopeKind.llama3,
    "yarn": RopeKind.yarn,
}
_ORIGINAL = "original_max_position_embeddings"
_NUMBERS = {  # by kind, what stands under the same name in both
    RopeKind.none: (),
    RopeKind.linear: ("factor",),
    RopeKind.llama3: ("factor", "low_freq_factor", "high_freq_factor"),
    RopeKind.yarn: ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor"),
}


def read_rope(fields: Fields) -> dict[str, Any]:
    """The keys of ModelConfig that say how positions rotate."""
    values = fields.values.get("rope_parameters")
    if values is None:
        values = {"rope_theta": fields.number("rope_theta")} | (fields.values.get("rope_scaling") or {})
    rope = Fields(values, f"{fields.where}: rope_parameters")
    name = values.get("rope_type", values.get("type", "default"))
    if name not in _KINDS:
        raise rope.refuse(f"rope_type={name!r} is not supported: {', '.join(_KINDS)} are")
    kind = _KINDS[name]
    for key in ("mscale", "mscale_all_dim"):
        rope.must_be(key, None)
    rope.must_be("partial_rotary_factor", 1.0)
    numbers = {key: values[key] for key in _NUMBERS[kind] if values.get(key) is not None}
    numbers |= {key: rope.number(key) for key in numbers if key != "truncate"}
    if kind in (RopeKind.llama3, RopeKind.yarn):
        stated = _ORIGINAL if values.get(_ORIGINAL) is not None else None
        numbers["original_max_positions"] = (
            rope.integer(stated) if stated else fields.integer("max_position_embeddings")
        )
    if kind is not RopeKind.none and "factor" not in numbers:
        raise rope.refuse("factor is missing")
    return {"rope_theta": rope.number("rope_theta"), "rope_scaling": RopeScaling(kind=kind, **numbers)}


def write_rope(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of :func:`read_rope`, in the words of transformers 5."""
    scaling = cfg.rope_scaling
    (name,) = [name for name, kind in _KINDS.items() if kind is scaling.kind]
    written: dict[str, Any] = {"rope_theta": cfg.rope_theta, "rope_type": name}
    for key in _NUMBERS[scaling.kind]:
        if getattr(scaling, key) is not None:
            written[key] = getattr(scaling, key)
    if scaling.kind in (RopeKind.llama3, RopeKind.yarn):
        written[_ORIGINAL] = scaling.original_max_positions
    return {"rope_parameters": written}
