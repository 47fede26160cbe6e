"""COMET: k soft decision trees over the experts (Ibrahim et al. 2023, arXiv:2306.02824).

Inner nodes send a token left or right by a smooth step, so that a path may have the probability 0 and its
leaf no part in the sum: training begins dense, and the trees' entropy, the router's penalty, makes each
choose a leaf. Follows the authors' gate (mazumder-lab/COMET, ``comet.py``), which does not run as released:
it reads an attribute that is nowhere set. Its permutation search is an option of every router
(``permutation.py``).

Shapes: T tokens, D model, E experts, K trees, I = E - 1 inner nodes a tree, W nodes of a level.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Optional

import torch
from torch import Tensor

from moetrain.bounds import above, at_least
from moetrain.moe.assign import from_mask
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import Router, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.smooth_choice import entropy_of_choices, smooth_step
from moetrain.ops.init import Normal, parameter
from moetrain.ops.linear import wide_linear

_THIRD = 3**-0.5  # a uniform draw of half-width h has the standard deviation h / sqrt(3)
_LEAST = 1e-20  # a path of less probability counts as impossible: the logarithm's slope stays within fp32


@dataclass(frozen=True)
class CometOptions(RouterConfig):
    name: str = "comet"
    top_k: Optional[int] = None  # trees, and so the experts of a token once they have chosen; null: 2
    gamma: float = field(default=1.0, metadata=above(0))  # width of the smooth step
    # in the penalty: of the trees' entropy
    entropy_coef: float = field(default=0.05, metadata=at_least(0))


@register("comet", CometOptions, "Ibrahim et al. 2023, arXiv:2306.02824", "k experts a token, more at first")
class CometRouter(Router):
    """Weights: the softmax over all leaves of all trees of leaf's score + log of its path's probability.

    The leaves of one expert are added up, one of each tree, so that weights sum to 1. Trees are filled level
    by level, as a heap, so that any E will do: node n has the children 2 n + 1 (with the step's value) and
    2 n + 2, and expert e is node E - 1 + e. Experts of weight 0 are not computed.
    """

    options: CometOptions
    has_logits = False
    has_penalty = True

    def __init__(self, d_model: int, num_experts: int, options: CometOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.trees = resolve_top_k(options.top_k, num_experts)
        self.usual_rows_per_token = 2.0 * self.trees
        self.inner = num_experts - 1
        node_std, leaf_std = options.gamma / 100 * _THIRD, 0.05 * _THIRD
        nodes, leaves = self.trees * self.inner, self.trees * num_experts
        self.leaf_weight_LD = parameter((leaves, d_model), Normal(leaf_std))
        self.leaf_bias_L = parameter((leaves,), Normal(leaf_std))
        # the tree of a single expert has no inner node
        self.node_weight_ND = parameter((nodes, d_model), Normal(node_std)) if nodes else None
        self.node_bias_N = parameter((nodes,), Normal(node_std)) if nodes else None

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        by_tree = (self.trees, self.num_experts)
        scores_TKE = (wide_linear(x_TD, self.leaf_weight_LD) + self.leaf_bias_L).unflatten(-1, by_tree)
        p_TKE = self.paths(x_TD, scores_TKE)
        out_TKE = p_TKE.detach() <= _LEAST
        log_p_TKE = torch.log(p_TKE.masked_fill(out_TKE, 1.0))
        s_TKE = (scores_TKE + log_p_TKE).masked_fill(out_TKE, float("-inf"))
        weights_TE = s_TKE.flatten(-2).softmax(-1).unflatten(-1, by_tree).sum(-2)
        active_TE = weights_TE.detach() != 0  # NaN is taken: the loss is to tell of it
        routing = from_mask(active_TE, weights_TE, ctx, weights_TE)
        penalty = self.options.entropy_coef * entropy_of_choices(p_TKE, ctx)
        return replace(routing, penalty=penalty)

    def paths(self, x_TD: Tensor, like_TKE: Tensor) -> Tensor:
        """The probability of each leaf's path, [T, K, E]; 1 in all for each tree."""
        level_TKW = torch.ones_like(like_TKE[..., :1])
        if self.node_weight_ND is None or self.node_bias_N is None:
            return level_TKW
        z_TN = wide_linear(x_TD, self.node_weight_ND) + self.node_bias_N
        s_TKI = smooth_step(z_TN, self.options.gamma).unflatten(-1, (self.trees, self.inner))
        leaves = []
        first = 0  # the number of the level's first node
        while level_TKW.shape[-1]:
            inner = min(max(self.inner - first, 0), level_TKW.shape[-1])  # the rest of the level are leaves
            leaves.append(level_TKW[..., inner:])
            s_TKW, p_TKW = s_TKI[..., first : first + inner], level_TKW[..., :inner]
            first += level_TKW.shape[-1]
            level_TKW = torch.stack([p_TKW * s_TKW, p_TKW * (1 - s_TKW)], -1).flatten(-2)
        return torch.cat(leaves, -1)
