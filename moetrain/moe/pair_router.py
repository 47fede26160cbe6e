"""The router of Monet (Park et al. 2024, arXiv:2412.04139): two soft choices of parts for each head.

A head scores n parts on either side. Scores are batch-normalised to choose: those stay that are at least
Phi^-1(1 - k / n), which of normal scores are k on average, and the best one in any case. The gates of a side
are the softmax of the raw scores that stay. An expert (i, j) weighs sum over heads of g1_i g2_j.

The batch norm has one mean and variance for each side and head, over tokens and parts, as in the released
code, by running statistics (:class:`RunningNorm`).

Shapes: T tokens, D model, H heads, n parts, E = 2 H n columns: side by side, in each head by head.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from moetrain.moe.assign import tokens_per_sequence
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import Router
from moetrain.moe.routing import RoutingRecord, register_record
from moetrain.moe.running_norm import RunningNorm
from moetrain.ops.init import Normal, parameter
from moetrain.ops.linear import wide_linear


@dataclass(frozen=True, kw_only=True)
class PairRecord(RoutingRecord):
    """``gates_TE``: fp32 at least, for layers that share the router. Demand counts the parts that stay."""

    gates_TE: Tensor


register_record(PairRecord)


class PairRouter(Router):
    """Raises ValueError for more chosen parts than there are."""

    has_scores = has_logits = False

    def __init__(self, d_model: int, n: int, heads: int, top_k: int, momentum: float) -> None:
        if top_k > n:
            raise ValueError(
                f"model.monet.top_k={top_k} exceeds the {n} parts of a side: sqrt(model.num_experts)"
            )
        super().__init__(d_model, 2 * heads * n, RouterConfig(name="monet"))
        self.n, self.heads = n, heads
        self.threshold = NormalDist().inv_cdf(1 - top_k / n) if top_k < n else -torch.inf
        self.weight_ED = parameter((2 * heads * n, d_model), Normal(d_model**-0.5 * 0.5))
        self.norm = RunningNorm(2 * heads, momentum)

    def forward(self, x_TD: Tensor, ctx: RouterContext) -> PairRecord:  # type: ignore[override]
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_TGn = wide_linear(x_TD, self.weight_ED).unflatten(1, (2 * self.heads, self.n))
            plain_TnG = scores_TGn.detach().transpose(1, 2)
            normed_TGn = self.norm(plain_TnG).transpose(1, 2)
            least_TG1 = normed_TGn.amax(-1, keepdim=True).clamp(max=self.threshold)
            kept_TGn = ~(normed_TGn < least_TG1)  # NaN stays, so that the step's loss shows it
            gates_TGn = scores_TGn.masked_fill(~kept_TGn, -torch.inf).softmax(-1)
            return self._record(kept_TGn, gates_TGn, plain_TnG, ctx)

    def after_step(self, stats: Tensor) -> None:
        """Move the statistics of scores by those of the step."""
        self.norm.move(stats)

    def _record(
        self, kept_TGn: Tensor, gates_TGn: Tensor, plain_TnG: Tensor, ctx: RouterContext
    ) -> PairRecord:
        valid_T = ctx.valid_T
        stats = None
        if self.training:
            weights_n = None if valid_T is None else valid_T.repeat_interleave(self.n)
            stats = self.norm.sums(plain_TnG.flatten(0, 1), weights_n)
        kept_TE = kept_TGn.flatten(1) if valid_T is None else kept_TGn.flatten(1) & valid_T[:, None]
        return PairRecord(
            num_tokens_B=tokens_per_sequence(ctx),
            demand_BE=kept_TE.view(ctx.batch, ctx.seq, self.num_experts).sum(1),
            valid_T=valid_T,
            stats=stats,
            gates_TE=gates_TGn.flatten(1),
        )
