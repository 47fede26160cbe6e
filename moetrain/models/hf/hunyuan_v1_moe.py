"""Hunyuan-A13B: queries and keys are normalised after they have turned; each layer has a shared expert of the
experts' width (Tencent Hunyuan Team 2025, Hunyuan-A13B Technical Report).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moetrain.errors import quoted
from moetrain.models.hf.family import Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.tables import MoENames
from moetrain.models.hf.translate import (
    SHARED,
    check_router,
    read_decoder,
    read_experts,
    require,
    require_all_moe,
    shared_number,
    write_decoder,
    write_topk,
)
from moetrain.models.options import QKNorm
from moetrain.moe.routers.topk import Score, TopKOptions

_NAMES = MoENames(
    router="mlp.gate.wg.weight",
    shared="mlp.shared_mlp",
    q_norm="self_attn.query_layernorm.weight",
    k_norm="self_attn.key_layernorm.weight",
)
_ONLY = {  # of the published config.json, which transformers does not read: what its class computes
    "use_qk_norm": True,
    "use_mixed_mlp_moe": True,
    "use_rotary_pos_emb": True,
    "use_cla": False,
    "use_mla": False,
    "norm_type": "rms",
    "position_embedding_xdrope": False,
    "moe_layer_num_skipped": 0,
}
# code beside the weights, where transformers has its own; how it was trained; what no layer has
_NOT_READ = (
    *("auto_map", "cla_share_factor", "moe_drop_tokens", "moe_random_routing_dropped_token"),
    *(
        "add_classification_head",
        "class_num",
        "pool_type",
        "dense_list",
        "mask_init_id",
        "group_limited_greedy",
    ),
)


def _read(fields: Fields) -> ModelSpec:
    for key, value in _ONLY.items():
        fields.must_be(key, value)
    fields.without_effect(*_NOT_READ)
    width, num_experts = fields.integer("intermediate_size"), _of_all_layers(fields, "num_experts")
    top_k = _of_all_layers(fields, "moe_topk")
    layers, biased = fields.layers(), fields.flag("attention_bias")
    for key, value in (("moe_intermediate_size", width), ("num_shared_expert", 1)):
        fields.must_be(key, value, [value] * layers)
    for alias, value in (("num_local_experts", num_experts), ("num_experts_per_tok", top_k)):
        fields.must_be(alias, value)
    model = read_decoder(
        fields,
        alpha_rope=True,
        qk_norm=QKNorm.head_after_rope,
        qkv_bias=biased,
        out_bias=biased,
        num_experts=num_experts,
        d_ff_expert=width,
        num_shared_experts=1,
    )
    router = TopKOptions(top_k=top_k, score=Score.softmax, renormalize=True)
    return ModelSpec(model, router, read_experts(fields))


def _of_all_layers(fields: Fields, key: str) -> int:
    """A number, or a list of as many equal ones as there are layers."""
    value = fields.get(key)
    if not isinstance(value, list):
        return fields.integer(key)
    if not value or type(value[0]) is not int or value != value[:1] * fields.layers():
        raise fields.refuse(
            f"{key}={quoted(value)} is not supported: one number, or the same for every layer"
        )
    return Fields({key: value[0]}, fields.where).integer(key)


def _write(spec: ModelSpec) -> dict[str, Any]:
    require_all_moe(spec, shared=True)
    m = spec.model
    require("model.sliding_window", m.sliding_window, None)
    require("model.out_bias", m.out_bias, m.qkv_bias)
    require("model.num_shared_experts of model.d_ff_expert's width", shared_number(m), 1)
    require("router.jitter", check_router(spec).jitter, 0.0)
    top_k, renormalized = write_topk(spec)
    require("router.renormalize", renormalized, True)
    as_dense = replace(spec, model=replace(m, d_ff=m.d_ff_expert))
    return write_decoder(as_dense, QKNorm.head_after_rope, m.qkv_bias, own=("out_bias",)) | {
        "attention_bias": m.qkv_bias,
        "num_experts": m.num_experts,
        "moe_topk": top_k,
    }


_DEFAULTS = SHARED | {
    "attention_bias": False,
    "max_position_embeddings": 2048,
    "moe_topk": 1,
    "rms_norm_eps": 1e-5,
}
register_family(
    Family(
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM",
        _read,
        _write,
        _NAMES,
        defaults=_DEFAULTS,
        fp32=(".router.weight_ED",),
    )
)
