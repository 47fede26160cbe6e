"""Switch: one expert a token, its probability as weight (Fedus et al. 2021, arXiv:2101.03961)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from moetrain.moe.routers.base import register
from moetrain.moe.routers.topk import TopKOptions, TopKRouter
from moetrain.ops.init import Initializer, Normal


@dataclass(frozen=True)
class SwitchOptions(TopKOptions):
    name: str = "switch"
    top_k: Optional[int] = 1
    renormalize: bool = False  # a normalised weight of one expert is the constant 1: no gradient
    evaluation_rule = TopKOptions.evaluation_rule


@register("switch", SwitchOptions, "Fedus et al. 2021, arXiv:2101.03961", "one expert a token")
class SwitchRouter(TopKRouter):
    """The top-k router at k = 1, where the order of softmax and selection matters.

    It begins with a tenth of the usual variance, as the paper's whole model does.
    """

    @staticmethod
    def first_weights(d_model: int) -> Initializer:
        return Normal((0.1 / d_model) ** 0.5)
