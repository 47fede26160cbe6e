"""ERNIE 4.5: neighbouring elements of a head turn, a softmax router with a bias of the choice, shared experts
without a gate (Baidu ERNIE Team 2025, ERNIE 4.5 Technical Report).
"""

from __future__ import annotations

from typing import Any

from moetrain.models.hf.family import CannotExpressError, Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.further import FutureNames
from moetrain.models.hf.tables import MoENames
from moetrain.models.hf.translate import (
    SHARED,
    check_router,
    read_decoder,
    read_experts,
    read_num_experts,
    require,
    shared_number,
    write_decoder,
    write_topk,
)
from moetrain.moe.routers.topk import Score, TopKOptions

_BIAS = "mlp.moe_statics.e_score_correction_bias"
_NAMES = MoENames(
    bias=_BIAS,
    bias_rows=1,
    shared="mlp.shared_experts",
    aliases={"mlp.gate.moe_statics.e_score_correction_bias": _BIAS},
)
_FURTHER = FutureNames(  # dense, before the decoder's own last norm
    block="model.mtp_block.{}.",
    token_norm="model.mtp_emb_norm.{}.weight",
    hidden_norm="model.mtp_hidden_norm.{}.weight",
    join="model.mtp_linear_proj.{}.weight",
    dense=True,
    key="num_nextn_predict_layers",
)
_ONLY = {  # what the router computes; the last two are not keys of transformers' class
    "moe_norm_min": 1e-12,
    "moe_use_aux_free": True,
    "moe_gate_act": "softmax",
}


def _read(fields: Fields) -> ModelSpec:
    for key, value in _ONLY.items():
        fields.must_be(key, value)
    # code beside the weights, where transformers has its own; the capacity and further tokens of training
    fields.without_effect("auto_map", "moe_capacity", "num_nextn_predict_layers")
    model = read_decoder(
        fields,
        rope_interleaved=True,
        num_experts=read_num_experts(fields, "moe_num_experts", "num_experts"),
        d_ff_expert=fields.integer("moe_intermediate_size"),
        num_shared_experts=fields.integer("moe_num_shared_experts"),
        **_read_layers(fields),
    )
    router = TopKOptions(top_k=_top_k(fields), score=Score.softmax, renormalize=True)
    return ModelSpec(model, router, read_experts(fields))


def _top_k(fields: Fields) -> int:
    return read_num_experts(fields, "moe_k", "num_experts_per_tok")


def _read_layers(fields: Fields) -> dict[str, Any]:
    """``moe_every`` and ``first_dense``; the last MoE layer may only be the last that these give."""
    layers, every = fields.layers(), fields.integer("moe_layer_interval")
    first, end = fields.integer("moe_layer_start_index"), "moe_layer_end_index"
    last = fields.integer(end) if fields.has(end) else -1  # the last of all
    if every < 1 or first < 0 or last < -1:
        raise fields.refuse(
            f"moe_layer_interval={every}, moe_layer_start_index={first} and moe_layer_end_index={last} "
            "name no layers"
        )
    if last != -1 and any((layer + 1) % every == 0 for layer in range(max(first, last + 1), layers)):
        raise fields.refuse(
            f"moe_layer_end_index={last} leaves dense layers at the end of {layers}: only those before the "
            "first MoE layer can be dense besides the interval's"
        )
    return {"moe_every": every, "first_dense": first}


def _write(spec: ModelSpec) -> dict[str, Any]:
    m = spec.model
    if not m.num_experts:
        raise CannotExpressError("model.num_experts=0, and it has experts")
    require("model.sliding_window", m.sliding_window, None)
    require("model.rope_interleaved", m.rope_interleaved, True)
    require("router.jitter", check_router(spec).jitter, 0.0)
    top_k, renormalized = write_topk(spec)
    require("router.renormalize", renormalized, True)
    return write_decoder(spec, own=("rope_interleaved",)) | {
        "use_bias": False,
        "moe_num_experts": m.num_experts,
        "moe_k": top_k,
        "moe_intermediate_size": m.d_ff_expert,
        "moe_num_shared_experts": shared_number(m),
        "moe_layer_interval": m.moe_every,
        "moe_layer_start_index": m.first_dense,
        "moe_layer_end_index": -1,
        "moe_norm_min": 1e-12,
    }


_DEFAULTS = SHARED | {
    "max_position_embeddings": 131072,
    "moe_k": 6,
    "moe_layer_interval": 1,
    "moe_layer_start_index": 1,
    "moe_num_shared_experts": 2,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": True,
}
register_family(
    Family(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        _read,
        _write,
        _NAMES,
        defaults=_DEFAULTS,
        left_out=("model.mtp_",),
        further=_FURTHER,
        fp32=(".router.weight_ED",),
    )
)
