"""The keys by which DeepSeek-V3's MoE layers are described, and those of the families that took them over.

Sigmoid scores, a bias that takes part in the choice alone, a choice within groups, a factor, shared experts
without a gate, and dense layers at the start (DeepSeek-AI 2024, arXiv:2412.19437).
"""

from __future__ import annotations

from typing import Any

from moetrain.models.hf.family import CannotExpressError, ModelSpec
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.tables import MoENames
from moetrain.models.hf.translate import check_router, read_num_experts, require, shared_number
from moetrain.models.options import ModelConfig
from moetrain.moe.routers.topk import GroupScore, Score, TopKOptions

NAMES = MoENames(bias="mlp.gate.e_score_correction_bias", shared="mlp.shared_experts")


def read_layers(fields: Fields) -> dict[str, Any]:
    """The keys of ModelConfig that say which layers are MoE, and how large."""
    shared = fields.integer("n_shared_experts")
    if shared < 1:
        raise fields.refuse(f"n_shared_experts={shared} must be 1 or more: its layers always have some")
    return {
        "num_experts": read_num_experts(fields, "n_routed_experts", "num_local_experts"),
        "d_ff_expert": fields.integer("moe_intermediate_size"),
        "num_shared_experts": shared,
        "first_dense": fields.integer("first_k_dense_replace"),
    }


def read_router(fields: Fields) -> TopKOptions:
    return TopKOptions(
        top_k=fields.integer("num_experts_per_tok"),
        score=Score.sigmoid,
        renormalize=fields.flag("norm_topk_prob"),
        route_scale=fields.number("routed_scaling_factor"),
        num_groups=fields.integer("n_group"),
        top_groups=fields.integer("topk_group"),
    )


def write_layers(m: ModelConfig) -> dict[str, Any]:
    """The inverse of :func:`read_layers`. Raises CannotExpressError for other layers."""
    if not m.num_experts:
        raise CannotExpressError("model.num_experts=0, and it has experts")
    if not m.num_shared_experts:
        raise CannotExpressError("model.num_shared_experts=0, and it has shared experts")
    require("model.moe_every", m.moe_every, 1)
    return {
        "n_routed_experts": m.num_experts,
        "moe_intermediate_size": m.d_ff_expert,
        "n_shared_experts": shared_number(m),
        "first_k_dense_replace": m.first_dense,
    }


def write_router(spec: ModelSpec) -> dict[str, Any]:
    """The inverse of :func:`read_router`. Raises CannotExpressError for any other router."""
    router = check_router(spec)
    require("router.score", router.score.name, Score.sigmoid.name)
    require("router.jitter", router.jitter, 0.0)
    groups = router.num_groups if router.top_groups is None else router.top_groups
    if groups < router.num_groups:
        require("router.group_score", router.group_score.name, GroupScore.top2.name)
    return {
        "num_experts_per_tok": min(2, spec.model.num_experts) if router.top_k is None else router.top_k,
        "norm_topk_prob": router.renormalize,
        "routed_scaling_factor": router.route_scale,
        "n_group": router.num_groups,
        "topk_group": groups,
    }
