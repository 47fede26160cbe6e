"""DeepSeek-V2 and V2-Lite: latent attention, scaled softmax weights (DeepSeek-AI 2024, arXiv:2405.04434)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moetrain.errors import quoted
from moetrain.models.hf.family import Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.latent import DEFAULTS, read_latent_decoder, write_latent_decoder
from moetrain.models.hf.sigmoid_moe import chosen, read_layers, write_layers
from moetrain.models.hf.tables import MoENames
from moetrain.models.hf.translate import check_router, read_experts, require
from moetrain.moe.routers.topk import GroupScore, Score, TopKOptions

_NAMES = MoENames(shared="mlp.shared_experts")
_GREEDY, _LIMITED = "greedy", "group_limited_greedy"


def _read(fields: Fields) -> ModelSpec:
    model = read_latent_decoder(fields, 2, True, **read_layers(fields, "num_experts"))
    return ModelSpec(model, _read_router(fields), read_experts(fields))


def _read_router(fields: Fields) -> TopKOptions:
    fields.must_be("scoring_func", "softmax")
    # transformers reads it nowhere, and DeepSeek's own code leaves the factor out where it is true
    fields.must_be("norm_topk_prob", False, None)
    options = TopKOptions(
        top_k=fields.integer("num_experts_per_tok"),
        score=Score.softmax,
        renormalize=False,
        route_scale=fields.number("routed_scaling_factor"),
        group_score=GroupScore.max,
    )
    method = fields.get("topk_method")
    if method == _GREEDY:
        fields.without_effect("n_group", "topk_group")
        return options
    if method != _LIMITED:
        raise fields.refuse(f"topk_method={quoted(method)} is not supported: {_GREEDY} and {_LIMITED} are")
    return replace(options, num_groups=fields.integer("n_group"), top_groups=fields.integer("topk_group"))


def _write(spec: ModelSpec) -> dict[str, Any]:
    written = write_latent_decoder(spec) | write_layers(spec.model)
    require("model.rope_interleaved", spec.model.rope_interleaved, True)
    router = check_router(spec)
    require("router.score", router.score.name, Score.softmax.name)
    require("router.renormalize", router.renormalize, False)
    require("router.jitter", router.jitter, 0.0)
    groups: dict[str, int] = {}
    if router.top_groups is not None and router.top_groups < router.num_groups:
        require("router.group_score", router.group_score.name, GroupScore.max.name)
        groups = {"n_group": router.num_groups, "topk_group": router.top_groups}
    return written | groups | {
        "num_experts_per_tok": chosen(router, spec.model),
        "routed_scaling_factor": router.route_scale,
        "topk_method": _LIMITED if groups else _GREEDY,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "mlp_bias": False,
    }  # fmt: skip


_DEFAULTS = DEFAULTS | {
    "max_position_embeddings": 2048,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "topk_method": _GREEDY,
}
register_family(Family("deepseek_v2", "DeepseekV2ForCausalLM", _read, _write, _NAMES, defaults=_DEFAULTS))
