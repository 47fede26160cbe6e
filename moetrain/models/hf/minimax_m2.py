"""MiniMax-M2: Mixtral's names, a sigmoid router with a bias, a part of each head turned, queries and keys
normalised over all heads at once (MiniMax 2026, arXiv:2605.26494).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moetrain.models.hf.family import Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.mixtral import NAMES as MIXTRAL
from moetrain.models.hf.translate import (
    SHARED,
    check_router,
    read_decoder,
    read_experts,
    read_num_experts,
    require,
    require_all_moe,
    write_decoder,
)
from moetrain.models.options import QKNorm
from moetrain.moe.routers.topk import Score, TopKOptions

_NAMES = replace(
    MIXTRAL,
    bias="block_sparse_moe.e_score_correction_bias",
    aliases={"mlp.e_score_correction_bias": "block_sparse_moe.e_score_correction_bias"},
)
_ONLY = {  # of the published config.json, which transformers does not read: what its class computes
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "shared_intermediate_size": 0,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_beta": 1.0,
}
# code beside the weights, where transformers has its own; and what no layer has
_NOT_READ = (
    *("auto_map", "mlp_intermediate_size", "shared_moe_mode", "sliding_window"),
    *("use_mtp", "num_mtp_modules", "mtp_transformer_layers"),
)


def _read(fields: Fields) -> ModelSpec:
    for key, value in _ONLY.items():
        fields.must_be(key, value)
    fields.must_be("attn_type_list", [1] * fields.layers())  # every layer attends to all
    fields.without_effect(*_NOT_READ)
    turned, head_dim = fields.integer_or_none("rotary_dim"), fields.integer("head_dim")
    if head_dim < 1:
        raise fields.refuse(f"head_dim={head_dim} must be 1 or more")
    model = read_decoder(
        fields,
        partial_rope=1.0 if turned is None else turned / head_dim,
        qk_norm=QKNorm.full,
        num_experts=read_num_experts(fields, "num_local_experts", "num_experts"),
        d_ff_expert=fields.integer("intermediate_size"),
    )
    router = TopKOptions(top_k=fields.integer("num_experts_per_tok"), score=Score.sigmoid)
    return ModelSpec(model, router, read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    require_all_moe(spec)
    m, router = spec.model, check_router(spec)
    require("model.sliding_window", m.sliding_window, None)
    require("router.score", router.score.name, Score.sigmoid.name)
    require("router.renormalize", router.renormalize, True)
    require("router.route_scale", router.route_scale, 1.0)
    require("router.jitter", router.jitter, 0.0)
    if router.top_groups != router.num_groups:
        require("router.top_groups", router.top_groups, None)
    as_dense = replace(spec, model=replace(m, d_ff=m.d_ff_expert))
    return write_decoder(as_dense, QKNorm.full, own=("rope_fraction",)) | {
        "num_local_experts": m.num_experts,
        "num_experts_per_tok": min(2, m.num_experts) if router.top_k is None else router.top_k,
    }


_DEFAULTS = SHARED | {
    "head_dim": 128,
    "max_position_embeddings": 196608,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 8,
    "rope_theta": 5e6,
}
register_family(Family("minimax_m2", "MiniMaxM2ForCausalLM", _read, _write, _NAMES, defaults=_DEFAULTS))
