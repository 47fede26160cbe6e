"""Granite's MoE models: constant factors, and experts stored as stacks of gate and up in one matrix (Granite
Team, IBM 2024, Granite 3.0 Language Models). ``granitemoeshared`` has a shared expert beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moetrain.models.hf.family import CannotExpressError, Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.pieces import Piece, Table, Tiled
from moetrain.models.hf.tables import MoENames, decoder_table
from moetrain.models.hf.translate import (
    SHARED,
    check_router,
    read_decoder,
    read_experts,
    read_num_experts,
    require,
    require_all_moe,
    write_decoder,
    write_topk,
)
from moetrain.models.options import ModelConfig, moe_layers
from moetrain.models.scale_options import ScalesConfig
from moetrain.moe.routers.topk import Score, TopKOptions

_UP, _DOWN = "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"
_SHARED_UP, _SHARED_DOWN = "shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight"
_ROUTER = "block_sparse_moe.router.layer.weight"
_NAMES = MoENames(
    router=_ROUTER,
    aliases={
        "block_sparse_moe.router.weight": _ROUTER,
        "block_sparse_moe.experts.gate_up_proj": _UP,
        "block_sparse_moe.experts.down_proj": _DOWN,
    },
)
_SHARED_WIDTH = "shared_intermediate_size"


def _read(fields: Fields) -> ModelSpec:
    return _read_with(fields, 0)


def _read_shared(fields: Fields) -> ModelSpec:
    width = fields.integer(_SHARED_WIDTH)
    if width < 0:
        raise fields.refuse(f"{_SHARED_WIDTH}={width} must be 0 or more")
    return _read_with(fields, width)


def _read_with(fields: Fields, shared_width: int) -> ModelSpec:
    biased = fields.flag("attention_bias")
    shared: dict[str, Any] = {"num_shared_experts": 1, "d_ff_shared": shared_width} if shared_width else {}
    model = read_decoder(
        fields,
        qkv_bias=biased,
        out_bias=biased,
        scales=ScalesConfig(
            embedding=fields.number("embedding_multiplier"),
            residual=fields.number("residual_multiplier"),
            attention=fields.number("attention_multiplier"),
            logits_divisor=fields.number("logits_scaling"),
        ),
        num_experts=read_num_experts(fields, "num_local_experts", "num_experts"),
        d_ff_expert=fields.integer("intermediate_size"),
        **shared,
    )
    router = TopKOptions(top_k=fields.integer("num_experts_per_tok"), score=Score.softmax_after)
    return ModelSpec(model, router, read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    require_all_moe(spec, shared=True)
    m = spec.model
    require("model.shared_gate", m.shared_gate, False)
    require("model.sliding_window", m.sliding_window, None)
    require("model.out_bias", m.out_bias, m.qkv_bias)
    require("model.scales.round_embedding", m.scales.round_embedding, False)
    require("router.jitter", check_router(spec).jitter, 0.0)
    top_k, renormalized = write_topk(spec)
    require("router.renormalize", renormalized, True)
    if m.scales.attention is None:  # so that a model without scales goes out as another family's
        raise CannotExpressError("model.scales.attention=null, and it states a number")
    as_dense = replace(spec, model=replace(m, d_ff=m.d_ff_expert))
    written = write_decoder(as_dense, qkv_bias=m.qkv_bias, own=("out_bias", "scales"))
    return written | {
        "attention_bias": m.qkv_bias,
        "embedding_multiplier": m.scales.embedding,
        "residual_multiplier": m.scales.residual,
        "attention_multiplier": m.scales.attention,
        "logits_scaling": m.scales.logits_divisor,
        "num_local_experts": m.num_experts,
        "num_experts_per_tok": top_k,
    }


def _write_without(spec: ModelSpec) -> dict[str, Any]:
    require("model.num_shared_experts", spec.model.num_shared_experts, 0)
    return _write(spec)


def _write_shared(spec: ModelSpec) -> dict[str, Any]:
    return _write(spec) | {_SHARED_WIDTH: spec.model.shared_width}


@dataclass(frozen=True)
class _Granite(Family):
    def table(self, spec: ModelSpec) -> Table:
        """All experts of a layer in two stacks, and of the shared one gate and up in one matrix."""
        m = spec.model
        table = decoder_table(m, spec.vocab_size, self.names)
        for layer in moe_layers(m):
            ours, theirs = f"blocks.{layer}.feed_forward.", f"model.layers.{layer}."
            table |= {ours + name: tiled for name, tiled in _stacks(m, theirs).items()}
        return table


def _stacks(m: ModelConfig, layer: str) -> Table:
    num_experts, d_model, width, shared = m.num_experts, m.d_model, m.d_ff_expert, m.shared_width
    gate_up = tuple(
        Piece(
            layer + _UP,
            offsets=(0, 0, column, 0),
            sizes=(num_experts, d_model, 1, width),
            shape=(num_experts, width, d_model),
            dims=(0, 3, 1),
            stored=(num_experts, 2 * width, d_model),
            at=(0, column * width, 0),
        )
        for column in range(2)
    )
    shape = (num_experts, width, d_model)
    down = Piece(layer + _DOWN, (0, 0, 0), shape, (num_experts, d_model, width), dims=(0, 2, 1))
    table = {
        "experts.w_gate_up_EDCF": Tiled((num_experts, d_model, 2, width), gate_up),
        "experts.w_down_EFD": Tiled(shape, (down,)),
    }
    for row, name in enumerate(("gate", "up") if shared else ()):
        stored = (2 * shared, d_model)
        piece = Piece.rows(layer + _SHARED_UP, stored, at=row * shared, ours=0, number=shared)
        table[f"shared.w_{name}_FD"] = Tiled((shared, d_model), (piece,))
    if shared:
        whole = Piece.whole(layer + _SHARED_DOWN, (d_model, shared))
        table["shared.w_down_DF"] = Tiled((d_model, shared), (whole,))
    return table


_DEFAULTS = SHARED | {
    "attention_bias": False,
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "max_position_embeddings": 2048,
    "num_experts_per_tok": 2,
    "residual_multiplier": 1.0,
}
register_family(
    _Granite("granitemoe", "GraniteMoeForCausalLM", _read, _write_without, _NAMES, defaults=_DEFAULTS)
)
register_family(
    _Granite(
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM",
        _read_shared,
        _write_shared,
        _NAMES,
        defaults=_DEFAULTS | {_SHARED_WIDTH: 0},
    )
)
