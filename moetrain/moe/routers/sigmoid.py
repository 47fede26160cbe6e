"""Sigmoid scores with a bias for selection only, from the best groups (DeepSeek-V3, arXiv:2412.19437)."""

from __future__ import annotations

from dataclasses import dataclass

from moetrain.moe.routers.base import register
from moetrain.moe.routers.topk import Score, TopKOptions, TopKRouter


@dataclass(frozen=True)
class SigmoidOptions(TopKOptions):
    name: str = "sigmoid"
    score: Score = Score.sigmoid
    evaluation_rule = TopKOptions.evaluation_rule


@register("sigmoid", SigmoidOptions, "DeepSeek-AI 2024, arXiv:2412.19437", "k experts a token")
class SigmoidRouter(TopKRouter):
    """The top-k router with sigmoid scores; a controller moves ``bias_E`` (``balance=aux_free``)."""
