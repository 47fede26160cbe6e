"""What Qwen3-Next and Qwen3.5 share: gated delta layers among those of gated attention, and norms around one.

Shapes: D model; of attention Q query heads times their width H; of gated delta layers J key heads, K their
width, N value heads, V their width, W taps of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from moetrain.errors import quoted
from moetrain.models.attention import head_shape
from moetrain.models.attention_options import GatedDeltaConfig
from moetrain.models.hf.family import CannotExpressError, Family, ModelSpec
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.further import FutureNames, block_names
from moetrain.models.hf.pieces import Piece, Table, Tiled
from moetrain.models.hf.translate import SHARED, read_decoder, require, write_decoder
from moetrain.models.options import ModelConfig, QKNorm, attention_kinds, attention_of, future_layers

DELTA, FULL = "gated_delta", "grouped_query"
_KINDS = {"linear_attention": DELTA, "full_attention": FULL}
_PARTIAL = 0.25  # of a head turns, where config.json does not say
_SIZES = {
    "num_key_heads": "linear_num_key_heads",
    "num_value_heads": "linear_num_value_heads",
    "key_head_dim": "linear_key_head_dim",
    "value_head_dim": "linear_value_head_dim",
    "conv_width": "linear_conv_kernel_dim",
}
_OWN = ("rope_fraction", "attention", "attention_pattern", "attention_gate", "zero_centered_norms")
LEFT_OUT = ("mtp.",)  # a layer that predicts a further token
FURTHER = FutureNames(
    block="mtp.layers.{}.",
    token_norm="mtp.pre_fc_norm_embedding.weight",
    hidden_norm="mtp.pre_fc_norm_hidden.weight",
    join="mtp.fc.weight",
    norm="mtp.norm.weight",
    most=1,  # several would share what has no number
)
_UNREAD = ("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
DEFAULTS = SHARED | {
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 2,
}


def read_hybrid(fields: Fields, **own: Any) -> ModelConfig:
    """The decoder; ``own`` as :func:`~moetrain.models.hf.translate.read_decoder` takes it."""
    fields.must_be("hidden_act", "silu")  # which the convolution has too
    fields.must_be("attn_output_gate", True)
    fields.without_effect(*_UNREAD)
    kinds = _layer_kinds(fields)
    delta = GatedDeltaConfig(**{ours: fields.integer(theirs) for ours, theirs in _SIZES.items()})
    if FULL in kinds:
        own |= {"qk_norm": QKNorm.head, "attention_gate": True}
    else:
        own |= {"rope_fraction": 1.0}
    return read_decoder(
        fields,
        partial_rope=_PARTIAL,
        attention_pattern=_period(kinds) if DELTA in kinds else (),
        gated_delta=delta if DELTA in kinds else GatedDeltaConfig(),
        zero_centered_norms=True,
        **own,
    )


def write_hybrid(spec: ModelSpec) -> dict[str, Any]:
    """The inverse of :func:`read_hybrid`. Raises CannotExpressError for any other decoder."""
    m = spec.model
    kinds = attention_kinds(m)
    if others := [kind for kind in kinds if kind not in _KINDS.values()]:
        raise CannotExpressError(f"its attentions are {' and '.join(_KINDS.values())}, not {others[0]}")
    require("model.zero_centered_norms", m.zero_centered_norms, True)
    require("model.sliding_window", m.sliding_window, None)
    require("experts.activation", spec.experts.activation.name, "swiglu")
    if FULL in kinds:
        require("model.attention_gate", m.attention_gate, True)
    written = write_decoder(spec, QKNorm.head if FULL in kinds else m.qk_norm, own=_OWN)
    written["rope_parameters"]["partial_rotary_factor"] = m.rope_fraction
    theirs = {ours: name for name, ours in _KINDS.items()}
    return written | {name: getattr(m.gated_delta, ours) for ours, name in _SIZES.items()} | {
        "attention_bias": False,
        "layer_types": [theirs[attention_of(m, layer)] for layer in range(m.num_layers)],
    }  # fmt: skip


def _layer_kinds(fields: Fields) -> list[str]:
    """Of every layer: as ``layer_types`` says, else every ``full_attention_interval``-th is full."""
    layers = fields.layers()
    found = fields.get("layer_types") if fields.has("layer_types") else None
    if found is None:
        interval = fields.integer("full_attention_interval") if fields.has("full_attention_interval") else 4
        if interval < 1:
            raise fields.refuse(f"full_attention_interval={interval} must be 1 or more")
        return [DELTA if (layer + 1) % interval else FULL for layer in range(layers)]
    fields.without_effect("full_attention_interval")
    if not isinstance(found, list) or not all(isinstance(kind, str) for kind in found):
        raise fields.refuse(f"layer_types is {quoted(found)}, not a list of names")
    if others := sorted(set(found) - _KINDS.keys()):
        raise fields.refuse(f"layer_types names {quoted(others[0])}: only {' and '.join(_KINDS)} are known")
    if len(found) != layers:
        raise fields.refuse(f"layer_types names {len(found)} layers of {layers}")
    return [_KINDS[kind] for kind in found]


def _period(kinds: list[str]) -> tuple[str, ...]:
    """The shortest beginning that, taken in turn, gives all."""
    for length in range(1, len(kinds) + 1):
        if all(kind == kinds[i % length] for i, kind in enumerate(kinds)):
            return tuple(kinds[:length])
    return tuple(kinds)


DeltaTable = Callable[[ModelConfig], Table]  # of one layer's projections, from ``in_proj`` on


@dataclass(frozen=True)
class HybridFamily(Family):
    """``projections``: of a gated delta layer, what goes in, in the family's own names and order."""

    projections: DeltaTable = field(kw_only=True)

    def table(self, spec: ModelSpec) -> Table:
        table, m = super().table(spec), spec.model
        for layer in (*range(m.num_layers), *future_layers(m)):
            start = f"blocks.{layer}.attention."
            if attention_of(m, layer) == DELTA:
                table = {name: tiled for name, tiled in table.items() if not name.startswith(start)}
                parts = self.projections(m) | _delta(m)
            else:
                parts = _gated_queries(m)
            for name, tiled in parts.items():
                begin = block_names(m, self.further, layer)
                pieces = tuple(replace(piece, theirs=begin + piece.theirs) for piece in tiled.pieces)
                table[start + name] = replace(tiled, pieces=pieces)
        return table


def _gated_queries(m: ModelConfig) -> Table:
    """Of each head, its rows of the queries and then those of its gate."""
    heads, _, width = head_shape(m)
    stored = (2 * heads * width, m.d_model)
    return {
        name: Tiled(
            (heads * width, m.d_model),
            tuple(
                Piece.rows("self_attn.q_proj.weight", stored, (2 * head + part) * width, head * width, width)
                for head in range(heads)
            ),
        )
        for part, name in enumerate(("w_q_QD", "w_gate_QD"))
    }


def _delta(m: ModelConfig) -> Table:
    """What both families call alike."""
    d = m.gated_delta
    keys, values = d.num_key_heads * d.key_head_dim, d.num_value_heads * d.value_head_dim
    return {
        "conv.weight_C1W": whole("conv1d.weight", (2 * keys + values, 1, d.conv_width)),
        "decay.a_log_N": whole("A_log", (d.num_value_heads,)),
        "decay.b_dt_N": whole("dt_bias", (d.num_value_heads,)),
        "norm.weight_D": whole("norm.weight", (d.value_head_dim,)),
        "w_out_DY": whole("out_proj.weight", (m.d_model, values)),
    }


def whole(name: str, shape: tuple[int, ...]) -> Tiled:
    return Tiled(shape, (Piece.whole(f"linear_attn.{name}", shape),))


def stacked(name: str, parts: dict[str, int], repeats: int, d_model: int) -> Table:
    """Ours of one tensor of theirs, in which ``parts`` (our name -> rows) take turns, ``repeats`` times."""
    rows = sum(parts.values())
    table, first = {}, 0
    for ours, number in parts.items():
        pieces = tuple(
            Piece.rows(f"linear_attn.{name}", (repeats * rows, d_model), i * rows + first, i * number, number)
            for i in range(repeats)
        )
        table[ours] = Tiled((repeats * number, d_model), pieces)
        first += number
    return table
