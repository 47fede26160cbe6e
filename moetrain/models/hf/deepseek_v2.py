"""DeepSeek-V2 and V2-Lite: latent attention, scaled softmax weights (DeepSeek-AI 2024, arXiv:2405.04434)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moetrain.errors import quoted
from moetrain.models.hf.family import Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.latent import DEFAULTS, NAMES, read_latent_decoder, write_latent_decoder
from moetrain.models.hf.scaled_topk import write_scaled
from moetrain.models.hf.translate import read_experts, require
from moetrain.moe.routers.topk import GroupScore, Score, TopKOptions

_GREEDY, _LIMITED = "greedy", "group_limited_greedy"


def _read(fields: Fields) -> ModelSpec:
    model = read_latent_decoder(fields, 2, "num_experts", rope_interleave=True)
    return ModelSpec(model, _read_router(fields), read_experts(fields))


def _read_router(fields: Fields) -> TopKOptions:
    fields.must_be("scoring_func", "softmax")
    # transformers reads it nowhere; DeepSeek's own code leaves the scale out where it is true
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
    groups, top_groups = fields.integer("n_group"), fields.integer("topk_group")
    return replace(options, num_groups=groups, top_groups=top_groups)


def _write(spec: ModelSpec) -> dict[str, Any]:
    written = write_latent_decoder(spec)
    require("model.latent.rope_interleave", spec.model.latent.rope_interleave, True)
    router, keys = write_scaled(spec, Score.softmax, GroupScore.max)
    require("router.renormalize", router.renormalize, False)
    limited = "n_group" in keys
    return written | keys | {
        "topk_method": _LIMITED if limited else _GREEDY,
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
register_family(Family("deepseek_v2", "DeepseekV2ForCausalLM", _read, _write, NAMES, defaults=_DEFAULTS))
