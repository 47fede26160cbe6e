"""The router of DeepSeek's models in their keys: scaled weights, and a choice that groups may limit."""

from __future__ import annotations

from typing import Any

from moetrain.models.hf.family import CannotExpressError, ModelSpec
from moetrain.models.hf.translate import require
from moetrain.moe.routers.sigmoid import SigmoidOptions
from moetrain.moe.routers.topk import GroupScore, Score, TopKOptions


def write_scaled(
    spec: ModelSpec, score: Score, group_score: GroupScore
) -> tuple[TopKOptions, dict[str, Any]]:
    """The router's options and the keys that say them; those of groups only where they limit the choice.

    Raises CannotExpressError for a router of another kind or ``score``, or of groups scored otherwise.
    """
    router, experts = spec.router, spec.model.num_experts
    require("experts.kind", spec.experts.kind.name, "networks")
    if type(router) not in (TopKOptions, SigmoidOptions) or not isinstance(router, TopKOptions):
        raise CannotExpressError(f"router={router.name} is not the top-k router")
    require("router.score", router.score.name, score.name)
    require("router.eval_capacity_factor", router.eval_capacity_factor, None)
    require("router.permutation_steps", router.permutation_steps, None)
    keys: dict[str, Any] = {
        "num_experts_per_tok": min(2, experts) if router.top_k is None else router.top_k,
        "routed_scaling_factor": router.route_scale,
    }
    if router.top_groups in (None, router.num_groups):
        return router, keys
    require("router.group_score", router.group_score.name, group_score.name)
    if group_score is GroupScore.top2 and router.num_groups == experts:
        raise CannotExpressError(f"router.num_groups={experts}, and its groups have two experts or more")
    return router, keys | {"n_group": router.num_groups, "topk_group": router.top_groups}
