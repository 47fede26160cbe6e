"""GPT-OSS: attention with sinks, windows in every other layer, experts with biases (OpenAI 2025,
arXiv:2508.10925).

Shapes: D model, E experts, C = 2 (gate, up), F hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moetrain.models.hf.family import Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.pieces import Piece, Table, Tiled
from moetrain.models.hf.tables import MoENames
from moetrain.models.hf.translate import (
    SHARED,
    read_decoder,
    read_num_experts,
    require,
    require_all_moe,
    write_decoder,
    write_topk,
)
from moetrain.models.hf.windows import read_windows, write_windows
from moetrain.models.options import LayerWindow, moe_layers
from moetrain.models.rope_options import RopeKind, RopeScaling
from moetrain.moe.options import Activation, ExpertsConfig
from moetrain.moe.routers.topk import Score, TopKOptions
from moetrain.ops.activations import ALPHA, LIMIT

_WINDOW = 128
_ROPE = RopeScaling(RopeKind.yarn, 32.0, original_max_positions=4096, truncate=False)  # where none is said


def _every_other(layer: int) -> LayerWindow:
    return LayerWindow.full if layer % 2 else LayerWindow.sliding


def _read(fields: Fields) -> ModelSpec:
    fields.must_be("hidden_act", "silu")
    fields.must_be("swiglu_alpha", ALPHA)
    fields.must_be("swiglu_limit", LIMIT)
    fields.without_effect("experts_per_token", "initial_context_length")  # of the first release's own code
    biased = fields.flag("attention_bias")
    said = fields.values.get("rope_parameters") is not None or fields.values.get("rope_scaling")
    width = fields.integer("intermediate_size")
    own: dict[str, Any] = {} if said else {"rope_scaling": _ROPE}
    model = read_decoder(
        fields,
        qkv_bias=biased,
        out_bias=biased,
        attention_sinks=True,
        num_experts=read_num_experts(fields, "num_local_experts", "num_experts"),
        d_ff_expert=width,
        **{"window_pattern": (), **read_windows(fields, _every_other)},
        **own,
    )
    top_k = fields.integer("num_experts_per_tok")
    router = TopKOptions(top_k=top_k, score=Score.softmax_after, logit_bias=True)
    return ModelSpec(model, router, ExpertsConfig(activation=Activation.swiglu_clamped, bias=True))


def _write(spec: ModelSpec) -> dict[str, Any]:
    require_all_moe(spec)
    m, router = spec.model, spec.router
    require("model.attention_sinks", m.attention_sinks, True)
    require("model.out_bias", m.out_bias, m.qkv_bias)
    require("experts.activation", spec.experts.activation.name, Activation.swiglu_clamped.name)
    require("experts.bias", spec.experts.bias, True)
    if isinstance(router, TopKOptions):
        require("router.logit_bias", router.logit_bias, True)
        router = replace(router, logit_bias=False)
    common = replace(  # what is left is what families share
        spec,
        model=replace(m, out_bias=False, attention_sinks=False, window_pattern=(), d_ff=m.d_ff_expert),
        router=router,
        experts=ExpertsConfig(),
    )
    top_k, renormalized = write_topk(common)
    require("router.renormalize", renormalized, True)
    return write_decoder(common, qkv_bias=m.qkv_bias) | write_windows(m, _WINDOW) | {
        "attention_bias": m.qkv_bias,
        "num_local_experts": m.num_experts,
        "num_experts_per_tok": top_k,
        "swiglu_alpha": ALPHA,
        "swiglu_limit": LIMIT,
    }  # fmt: skip


@dataclass(frozen=True)
class _GptOss(Family):
    def table(self, spec: ModelSpec) -> Table:
        """All experts of a layer lie in one tensor, in which gate and up columns take turns."""
        table, m = super().table(spec), spec.model
        experts, width, hidden = m.num_experts, m.d_model, m.d_ff_expert
        for layer in moe_layers(m):
            ours, theirs = f"blocks.{layer}.feed_forward.", f"model.layers.{layer}.mlp."
            table |= {
                ours + "router.logit_bias_E": _whole(theirs + "router.bias", (experts,)),
                ours + "experts.w_gate_up_EDCF": _folded(
                    theirs + "experts.gate_up_proj", (experts, width, 2, hidden), (0, 1, 3, 2)
                ),
                ours + "experts.w_down_EFD": _whole(theirs + "experts.down_proj", (experts, hidden, width)),
                ours + "experts.bias_gate_up_ECF": _folded(
                    theirs + "experts.gate_up_proj_bias", (experts, 2, hidden), (0, 2, 1)
                ),
                ours + "experts.bias_down_ED": _whole(theirs + "experts.down_proj_bias", (experts, width)),
            }
        return table


def _whole(name: str, shape: tuple[int, ...]) -> Tiled:
    return Tiled(shape, (Piece.whole(name, shape),))


def _folded(name: str, shape: tuple[int, ...], dims: tuple[int, ...]) -> Tiled:
    *outer, slow, fast = (shape[dim] for dim in dims)
    piece = Piece(name, (0,) * len(shape), shape, (*outer, slow * fast), dims, folded=True)
    return Tiled(shape, (piece,))


_NAMES = MoENames(router="mlp.router.weight", stacked=True)
_DEFAULTS = SHARED | {
    "attention_bias": True,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "sliding_window": _WINDOW,
}
register_family(_GptOss("gpt_oss", "GptOssForCausalLM", _read, _write, _NAMES, defaults=_DEFAULTS))
