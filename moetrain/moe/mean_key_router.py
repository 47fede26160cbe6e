"""Avg-K: an expert's logit is the token's product with the mean of the expert's keys (arXiv:2305.13999).

An expert is a block of a feed-forward network's hidden units, a unit's key is its column of the first matrix,
and so a logit is the mean of the block's pre-activations; the router has no weights (Liu et al. 2023). Of a
gated activation the keys are the gate's, as in the released code of EMoE (Qiu et al. 2024), which routes
trained models so. The abstract and summaries were read, and that code; the paper's body was not.

Shapes: T tokens, D model, E experts, K top-k.
"""

from __future__ import annotations

from torch import Tensor

from moetrain.moe.context import RouterContext
from moetrain.moe.routers.topk import TopKOptions, TopKRouter
from moetrain.moe.token_choice import Chosen
from moetrain.ops.linear import wide_linear


class MeanKeyRouter(TopKRouter):
    """:class:`TopKRouter` over such logits, with its options; the layer gives the keys (``ctx.keys_ED``).

    ``whole``: each chosen block counts as a part of one network does, with a weight of ``route_scale`` that
    has no gradient; else weights are those of the options.
    """

    def __init__(self, d_model: int, num_experts: int, options: TopKOptions, whole: bool) -> None:
        super().__init__(d_model, num_experts, options)
        del self.weight_ED
        self.whole = whole

    def rows_ED(self) -> None:
        """None: it keeps none."""

    def logits_in(self, x_TD: Tensor, ctx: RouterContext) -> Tensor:
        """[T, E]. Raises ValueError where the context has no keys."""
        if ctx.keys_ED is None:
            raise ValueError(
                "Avg-K's router is asked without its layer: give it a RouterContext with keys_ED"
            )
        return wide_linear(x_TD, ctx.keys_ED)

    def choose(self, logits_TE: Tensor, forced_TK: Tensor | None = None) -> Chosen:
        chosen = super().choose(logits_TE, forced_TK)
        if not self.whole:
            return chosen
        scale = chosen.weights_TK.new_full(chosen.weights_TK.shape, self.options.route_scale)
        return chosen._replace(weights_TK=scale)
