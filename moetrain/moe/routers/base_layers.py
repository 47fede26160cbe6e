"""BASE layers: every expert gets the same number of tokens (Lewis et al. 2021, arXiv:2103.16716).

Training solves a balanced assignment in each routing group; evaluation takes each token's best expert.
Not causal in training: a token's expert depends on the others of its group.

Shapes: T tokens, E experts, G groups of L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

import torch
from torch import Tensor

from moetrain.bounds import above
from moetrain.moe.assign import from_token_choice
from moetrain.moe.context import RouterContext
from moetrain.moe.evaluation import Words, token_choice
from moetrain.moe.groups import by_group
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register
from moetrain.moe.routing import Routing
from moetrain.moe.solvers import auction, balanced_assignment, finite_scores
from moetrain.moe.topk_ops import first_max, softmax
from moetrain.ops.init import Orthogonal, set_initializer
from moetrain.ops.transfer import to_device


class Solver(Enum):
    """``exact``: the best assignment, on the host; ``auction``: within eps of it per token, on the device."""

    exact = "exact"
    auction = "auction"


class Affinity(Enum):
    """Of what: ``normed``: the layer's input, as with other routers; ``stream``: the residual stream before
    the norm, as in the authors' code, whose experts' layers have norms of their own."""

    normed = "normed"
    stream = "stream"


@dataclass(frozen=True)
class BaseOptions(RouterConfig):
    name: str = "base"
    affinity: Affinity = Affinity.normed
    solver: Solver = Solver.exact
    # of the auction: the share of the scores' range that a token may lose
    eps: float = field(default=0.02, metadata=above(0))

    def evaluation_rule(self, num_experts: int) -> Optional[Words]:
        if self.affinity is Affinity.stream:
            return None
        return token_choice(1, select="logits", score="sigmoid")


@register(
    "base",
    BaseOptions,
    "Lewis et al. 2021, arXiv:2103.16716",
    "one expert a token, equal counts in training",
)
class BaseRouter(LinearRouter):
    """Weights are sigmoid(x . w_e); no gradient through the assignment. Counts differ by one at most.

    With ``affinity=stream`` x is the residual stream, and the block x + sigmoid(x . w_e) FFN_e(norm(x)).
    """

    top_k = 1
    causal = False

    def __init__(self, d_model: int, num_experts: int, options: BaseOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.reads_stream = options.affinity is Affinity.stream
        set_initializer(self.weight_ED, Orthogonal(0.1))

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        affinity_TE = finite_scores(logits_TE.detach())
        ids_T = self._balanced(affinity_TE, ctx) if self.training else first_max(affinity_TE)
        safe_T = ids_T.clamp(max=self.num_experts - 1)  # padding has no expert
        weights_T1 = logits_TE.gather(-1, safe_T[:, None]).sigmoid()
        return from_token_choice(
            safe_T[:, None], weights_T1, ctx, self.num_experts, softmax(logits_TE), logits_TE
        )

    def _balanced(self, affinity_TE: Tensor, ctx: RouterContext) -> Tensor:
        groups = by_group(affinity_TE, ctx, self.options.group)
        scores_GLE, valid_GL = groups.values_GLC, groups.valid_GL
        options = self.options
        assert isinstance(options, BaseOptions)
        if options.solver is Solver.exact:
            return groups.own(_exact(scores_GLE, valid_GL))
        if not scores_GLE.numel():
            return groups.own(torch.zeros_like(valid_GL, dtype=torch.int64))
        range_G = scores_GLE.amax((1, 2)) - scores_GLE.amin((1, 2))
        return groups.own(auction(scores_GLE, valid_GL, (options.eps * range_G).clamp(min=1e-6))[0])


def _exact(scores_GLE: Tensor, valid_GL: Tensor) -> Tensor:
    ids_GL = torch.zeros(valid_GL.shape, dtype=torch.int64)
    both_GLF = torch.cat([scores_GLE.double(), valid_GL[..., None].double()], -1).cpu()  # one wait
    for scores_LE, valid_L, ids_L in zip(both_GLF[..., :-1], both_GLF[..., -1].bool(), ids_GL, strict=True):
        ids_L[valid_L] = torch.from_numpy(balanced_assignment(scores_LE[valid_L].numpy()).expert_T)
    return to_device(ids_GL, scores_GLE.device)
