"""Rotary embedding's keys, which Hugging Face writes in two ways: transformers 5's, and the older one.

Read as transformers 5 reads them (``modeling_rope_utils.py``): a ``rope_scaling`` that is not empty takes the
place of all ``rope_parameters``, and what neither of them says stands at the top or is the family's default.
"""

from __future__ import annotations

import math
from typing import Any

from moetrain.errors import quoted
from moetrain.models.hf.fields import Fields
from moetrain.models.options import ModelConfig
from moetrain.models.rope_options import RopeKind, RopeScaling

THETA = 10000.0
_KINDS = {
    "default": RopeKind.none,
    "linear": RopeKind.linear,
    "llama3": RopeKind.llama3,
    "yarn": RopeKind.yarn,
}
_ORIGINAL, _PARTIAL = "original_max_position_embeddings", "partial_rotary_factor"
_NUMBERS = {  # by kind, what stands under the same name in both
    RopeKind.none: (),
    RopeKind.linear: ("factor",),
    RopeKind.llama3: ("factor", "low_freq_factor", "high_freq_factor"),
    RopeKind.yarn: (
        *("factor", "beta_fast", "beta_slow", "truncate", "attention_factor"),
        *("mscale", "mscale_all_dim"),
    ),
}
# of other kinds, which transformers ignores, with a warning, where the kind does not read them
_OF_OTHERS = (
    *("factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "finetuned", _ORIGINAL),
    *("mrope_section", "mrope_interleaved"),  # which axis of an image turns which pair: in a text all agree
)


def read_rope(
    fields: Fields, partial: float | None = None, scores: bool = False, alpha_width: int | None = None
) -> dict[str, Any]:
    """The keys of ModelConfig that say how positions rotate.

    ``partial``: the part of a head that turns where none is said; None: the family turns whole heads.
    ``scores``: whether ``mscale_all_dim`` scales the scores of attention, too.
    ``alpha_width``: of a head, in a family that knows a dynamic scaling by a fixed ``alpha``; None: it does
    not.
    """
    rope = _parameters(fields)
    name = rope.get("rope_type" if rope.has("rope_type") else "type")
    stretch = 1.0
    if alpha_width is not None and name == "dynamic" and _stated(rope, "alpha"):
        name, stretch = "default", _stretch(rope, alpha_width)
    if not isinstance(name, str) or name not in _KINDS:
        raise rope.refuse(f"rope_type={quoted(name)} is not supported: {', '.join(_KINDS)} are")
    kind = _KINDS[name]
    rope.without_effect("type", *_OF_OTHERS)
    fraction = _fraction(fields, rope, partial)
    numbers: dict[str, Any] = {
        key: rope.number(key)
        for key in _NUMBERS[kind]
        if key not in ("truncate", "mscale", "mscale_all_dim") and _stated(rope, key)
    }
    if kind in (RopeKind.llama3, RopeKind.yarn):
        numbers["original_max_positions"] = _original(fields, rope)
    if kind is RopeKind.yarn:
        numbers |= _yarn(fields, rope, numbers, scores)
    elif scores and kind is not RopeKind.none:  # of which no model is known
        rope.must_be("mscale_all_dim", None, 0)
    for key in ("factor",) if kind is RopeKind.yarn else _NUMBERS[kind]:
        if key not in numbers:
            raise rope.refuse(f"{key} is missing")
    theta = rope.number("rope_theta") if rope.has("rope_theta") else fields.number("rope_theta")
    theta *= stretch
    scaling = RopeScaling(kind=kind, **numbers)
    _check(rope, theta, scaling)
    if unknown := sorted(rope.unused()):
        raise rope.refuse(f"{unknown[0]}={quoted(rope.values[unknown[0]])} is not known to change nothing")
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_fraction": fraction}


def _stretch(rope: Fields, width: int) -> float:
    """What a fixed ``alpha`` multiplies the base by ("NTK-aware" scaling; of Hunyuan)."""
    alpha = rope.number("alpha")
    if not alpha > 0 or width < 3:
        raise rope.refuse(f"alpha={alpha} of heads of {width} elements: both must be more, than 0 and 2")
    try:
        stretch: float = alpha ** (width / (width - 2))
    except OverflowError:
        stretch = math.inf
    if not math.isfinite(stretch):
        raise rope.refuse(f"alpha={alpha} is too large")
    return stretch


def _fraction(fields: Fields, rope: Fields, partial: float | None) -> float:
    """The one inside wins over that at the top, and that over the family's own."""
    if partial is None:
        for place in (rope, fields):
            place.must_be(_PARTIAL, 1.0, *([None] if place is fields else []))
        return 1.0
    fields.without_effect(_PARTIAL)
    if rope.has(_PARTIAL):
        return rope.number(_PARTIAL)
    if not fields.has(_PARTIAL):
        return partial
    return 1.0 if fields.get(_PARTIAL) is None else fields.number(_PARTIAL)


def _parameters(fields: Fields) -> Fields:
    """The dictionary that holds: ``rope_scaling`` where it is not empty, else ``rope_parameters``."""
    found: dict[str, dict[str, Any]] = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = fields.get(key) if fields.has(key) else None
        if value is not None and not isinstance(value, dict):
            raise fields.refuse(f"{key} is {quoted(value)}, not an object")
        found[key] = value or {}
    fields.without_effect("rope_theta", _ORIGINAL)  # unless the kind asks for it below
    key = "rope_scaling" if found["rope_scaling"] else "rope_parameters"
    return Fields(found[key], f"{fields.where}: {key}", defaults={"type": "default"})


def _stated(rope: Fields, key: str) -> bool:
    return rope.has(key) and rope.get(key) is not None


def _original(fields: Fields, rope: Fields) -> int:
    """At the top it wins over the one inside; without either, the model's whole length."""
    for place in (fields, rope):
        if place.has(_ORIGINAL):
            return place.integer(_ORIGINAL)
    return fields.integer("max_position_embeddings")


def _yarn(fields: Fields, rope: Fields, numbers: dict[str, Any], scores: bool) -> dict[str, Any]:
    """What transformers computes where the numbers are null, 0 or left to others."""
    found: dict[str, Any] = {}
    if rope.has("factor") and rope.get("factor") is None:
        original = numbers["original_max_positions"]
        if original < 1:
            raise rope.refuse(f"{_ORIGINAL}={original} must be 1 or more")
        found["factor"] = fields.integer("max_position_embeddings") / original
    for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        found[key] = numbers.get(key) or default
    truncate = rope.get("truncate") if rope.has("truncate") else True
    if truncate is not None and not isinstance(truncate, bool):
        raise rope.refuse(f"truncate is {quoted(truncate)}, not true or false")
    found["truncate"] = bool(truncate)
    scales = {key: rope.number(key) if _stated(rope, key) else 0 for key in ("mscale", "mscale_all_dim")}
    both = "attention_factor" not in numbers and all(scales.values())
    if both:
        found["mscale"] = scales["mscale"]
    if scales["mscale_all_dim"] and (both or scores):
        found["mscale_all_dim"] = scales["mscale_all_dim"]
    return found


def _check(rope: Fields, theta: float, s: RopeScaling) -> None:
    """The ranges that ``models/rules.py`` demands, too; beyond them no frequency is sensible."""
    if not theta > (1 if s.kind is RopeKind.yarn else 0):
        raise rope.refuse(f"rope_theta={theta} must be more than {1 if s.kind is RopeKind.yarn else 0}")
    if not s.factor >= 1:
        raise rope.refuse(f"factor={s.factor} must be 1 or more")
    if s.original_max_positions is not None and s.original_max_positions < 1:
        raise rope.refuse(f"{_ORIGINAL}={s.original_max_positions} must be 1 or more")
    if s.attention_factor is not None and not s.attention_factor > 0:
        raise rope.refuse(f"attention_factor={s.attention_factor} must be more than 0")
    for key in ("mscale", "mscale_all_dim"):
        if getattr(s, key) is not None and not getattr(s, key) > 0:
            raise rope.refuse(f"{key}={getattr(s, key)} must be more than 0")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        least, most = getattr(s, low), getattr(s, high)
        if not (0 < least < most or (0 < least == most and low == "beta_slow")):
            raise rope.refuse(f"{high}={most} must be above {low}={least}, above 0")


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
    if cfg.rope_fraction != 1:
        written[_PARTIAL] = cfg.rope_fraction
    return {"rope_parameters": written}
