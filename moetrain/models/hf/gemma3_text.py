"""Gemma 3, its language model: norms around each half of a block; layers with a window turn by a base
of their own (Gemma Team 2025, arXiv:2503.19786).
"""

from __future__ import annotations

from typing import Any

from moetrain.errors import quoted
from moetrain.models.attention import head_shape
from moetrain.models.hf.family import CannotExpressError, Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.rope import read_rope, write_rope
from moetrain.models.hf.translate import read_decoder, read_experts, require, require_dense, write_decoder
from moetrain.models.hf.windows import read_windows, write_windows
from moetrain.models.options import LayerWindow, ModelConfig, QKNorm
from moetrain.models.rope_options import RopeKind
from moetrain.models.scale_options import ScalesConfig

_FULL, _LOCAL = "full_attention", "sliding_attention"
_THETA = {_FULL: 1e6, _LOCAL: 1e4}  # where none is said
_THETA_KEY = {_FULL: "rope_theta", _LOCAL: "rope_local_base_freq"}
_SCORES, _EVERY, _ACTIVATION = "query_pre_attn_scalar", "sliding_window_pattern", "hidden_activation"
_WINDOW = 4096
_LARGEST = 1e6  # of 1 / the scores' scale; the published ones are 16 at most
_OWN = (
    *("out_bias", "window_pattern", "window_rope_theta", "zero_centered_norms", "sandwich_norms", "scales"),
)


def _read(fields: Fields) -> ModelSpec:
    width = fields.integer("hidden_size")
    biased = fields.flag("attention_bias")
    scales = ScalesConfig(
        embedding=max(width, 1) ** 0.5, attention=_score_scale(fields), round_embedding=width != 1
    )
    windows: dict[str, Any] = {"window_pattern": (), **_read_windows(fields)}
    model = read_decoder(
        fields,
        rope=_read_ropes(fields, windows),
        qk_norm=QKNorm.head,
        qkv_bias=biased,
        out_bias=biased,
        zero_centered_norms=True,
        sandwich_norms=True,
        scales=scales,
        **windows,
    )
    return ModelSpec(model, experts=read_experts(fields, _ACTIVATION))


def _write(spec: ModelSpec) -> dict[str, Any]:
    require_dense(spec)
    m = spec.model
    for key in ("zero_centered_norms", "sandwich_norms"):
        require(f"model.{key}", getattr(m, key), True)
    require("model.out_bias", m.out_bias, m.qkv_bias)
    require("model.scales.embedding", m.scales.embedding, m.d_model**0.5)
    require("model.scales.round_embedding", m.scales.round_embedding, m.d_model != 1)
    for key in ("residual", "logits_divisor"):
        require(f"model.scales.{key}", getattr(m.scales, key), 1.0)
    if m.d_model % m.num_heads:  # transformers refuses it, though heads have a width of their own
        raise CannotExpressError(f"model.num_heads={m.num_heads} does not divide model.d_model={m.d_model}")
    scalar = _write_score_scale(m)
    written = write_decoder(spec, QKNorm.head, m.qkv_bias, own=_OWN) | write_windows(m, _WINDOW)
    written[_ACTIVATION] = written.pop("hidden_act")
    return written | _write_ropes(m) | {_SCORES: scalar, "attention_bias": m.qkv_bias}


def _score_scale(fields: Fields) -> float | None:
    """1 / sqrt(scalar); None where that is what the heads' width gives."""
    scalar = fields.number(_SCORES)
    if not scalar > 0:
        raise fields.refuse(f"{_SCORES}={scalar} must be more than 0")
    return None if scalar == fields.integer_or_none("head_dim") else scalar**-0.5


def _write_score_scale(m: ModelConfig) -> int:
    """transformers takes whole numbers only."""
    if m.scales.attention is None:
        return head_shape(m).head_dim
    inverse = 1 / m.scales.attention  # 1e-320 has none
    scalar = round(inverse**2) if inverse < _LARGEST else 0
    if not scalar or scalar**-0.5 != m.scales.attention:
        raise CannotExpressError(
            f"model.scales.attention={m.scales.attention}, and it has only 1 / sqrt(a whole number)"
        )
    return scalar


def _read_windows(fields: Fields) -> dict[str, Any]:
    fields.without_effect(_EVERY)  # where there is a list
    listed = fields.has("layer_types") and fields.get("layer_types") is not None
    every = 1 if listed else fields.integer(_EVERY)
    if every < 1:
        raise fields.refuse(f"{_EVERY}={every} must be 1 or more")
    return read_windows(fields, lambda at: LayerWindow.sliding if (at + 1) % every else LayerWindow.full)


def _read_ropes(fields: Fields, windows: dict[str, Any]) -> dict[str, Any]:
    """The base and scaling of full layers, and the base of those with the window, which are not scaled.

    As transformers reads them: ``rope_scaling`` is of full layers; a base stands within, or at the top.
    """
    said = fields.get("rope_parameters") if fields.has("rope_parameters") else None
    scaling = fields.get("rope_scaling") if fields.has("rope_scaling") else None
    for key, value in (("rope_parameters", said), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            raise fields.refuse(f"{key} is {quoted(value)}, not an object")
    if scaling and "type" in scaling and "rope_type" not in scaling:
        raise fields.refuse(
            "rope_scaling has a type and no rope_type, which transformers reads here: rename it"
        )
    kinds = Fields(said or {}, f"{fields.where}: rope_parameters")
    found: dict[str, dict[str, Any]] = {}
    for kind in (_FULL, _LOCAL):
        values = (kinds.get(kind) if kinds.has(kind) else None) or {}
        if not isinstance(values, dict):
            raise kinds.refuse(f"{kind} is {quoted(values)}, not an object")
        found[kind] = _read_one(fields, kind, values | (scaling or {}) if kind == _FULL else values)
    if unknown := sorted(kinds.unused()):
        raise kinds.refuse(
            f"{unknown[0]}={quoted(kinds.values[unknown[0]])} is not known: only of layers' kinds"
        )
    if windows["sliding_window"] is not None and not windows["window_pattern"]:
        return found[_LOCAL]
    if windows["sliding_window"] is None or found[_FULL] == found[_LOCAL]:
        return found[_FULL]
    return found[_FULL] | {"window_rope_theta": found[_LOCAL]["rope_theta"]}


def _read_one(fields: Fields, kind: str, values: dict[str, Any]) -> dict[str, Any]:
    key = _THETA_KEY[kind]
    fields.without_effect(key)  # where it stands within
    values = values if "rope_theta" in values else values | {"rope_theta": fields.number(key)}
    inner = Fields({"rope_parameters": values}, f"{fields.where}: {kind}")
    known = (RopeKind.none, RopeKind.linear) if kind == _FULL else (RopeKind.none,)
    name = values.get("rope_type", values.get("type", "default"))
    if name not in ("default", *(rope.name for rope in known)):
        raise inner.refuse(f"rope_type={quoted(name)} is not supported there")
    return read_rope(inner)


def _write_ropes(m: ModelConfig) -> dict[str, Any]:
    full = write_rope(m)["rope_parameters"]
    if m.rope_scaling.kind not in (RopeKind.none, RopeKind.linear):
        raise CannotExpressError(
            f"model.rope_scaling.kind={m.rope_scaling.kind.name}, and it has only linear"
        )
    if m.sliding_window is not None and m.window_rope_theta is None:  # layers with it are not scaled
        require("model.rope_scaling.kind", m.rope_scaling.kind.name, RopeKind.none.name)
    local = m.rope_theta if m.window_rope_theta is None else m.window_rope_theta
    return {"rope_parameters": {_FULL: full, _LOCAL: {"rope_theta": local, "rope_type": "default"}}}


_DEFAULTS = {  # sizes too: the makers' files of the models with images do not say them all
    "attention_bias": False,
    "head_dim": 256,
    _ACTIVATION: "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    _SCORES: 256,
    "rms_norm_eps": 1e-6,
    _THETA_KEY[_FULL]: _THETA[_FULL],
    _THETA_KEY[_LOCAL]: _THETA[_LOCAL],
    "sliding_window": _WINDOW,
    _EVERY: 6,
    "tie_word_embeddings": True,
    "vocab_size": 262208,
}
register_family(Family("gemma3_text", "Gemma3ForCausalLM", _read, _write, defaults=_DEFAULTS))
