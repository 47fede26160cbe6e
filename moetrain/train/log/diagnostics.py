"""What an evaluation tells of routing: how alike routers' rows are, and how load follows liking.

Shapes: T tokens, E experts of one layer, D model; C = 2E + 1 sums of a layer (demand_E, logits_E, tokens).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe import Router, RoutingRecord
from moetrain.ops.local_part import whole
from moetrain.parallel.distributed import all_reduce_sum_

_LEAST_EXPERTS = 3  # of a fit of two numbers


class RoutingDiagnostics:
    """Sums over an evaluation's tokens, then ``moe/<layer>/<name>`` -> figure (``docs/metrics.md``)."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    @torch.no_grad()
    def add(self, records: Mapping[int, RoutingRecord]) -> None:
        """Count one batch: a layer's place -> its record. Layers without logits have no congestion."""
        for layer, record in records.items():
            if record.logits_TE is None:
                continue
            logits_TE = record.logits_TE.double()
            if record.valid_T is not None:
                logits_TE = logits_TE.masked_fill(~record.valid_T[:, None], 0.0)
            sums_C = torch.cat([record.demand_E.double(), logits_TE.sum(0), record.num_tokens.double()[None]])
            self._sums[layer] = self._sums[layer] + sums_C if layer in self._sums else sums_C

    def row(self, routers: Mapping[int, Router], group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """The figures over the ranks of ``group``; all ranks call it together. Figures that are not defined,
        as of a single expert or an even load, are left out."""
        if self._sums:
            all_reduce_sum_(*self._sums.values(), name="the routing of an evaluation", group=group)
        found = {f"moe/{n}/router_similarity": row_similarity(r) for n, r in routers.items()}
        for layer, sums_C in self._sums.items():
            demand, logits = sums_C[:-1].cpu().chunk(2)
            found[f"moe/{layer}/congestion"] = congestion(demand, logits / sums_C[-1].cpu().clamp(min=1))
        return {key: value for key, value in found.items() if value is not None}


@torch.no_grad()
def row_similarity(router: Router) -> float | None:
    """The mean absolute cosine of two experts' rows; None for a router without rows, or with one, and where
    DeepSpeed's stage 3 has cut them.
    """
    rows = router.rows_ED()
    if rows is None or router.num_experts < 2 or not rows.numel():
        return None
    unit_ED = torch.nn.functional.normalize(whole(rows).double(), dim=-1)
    cosine_EE = (unit_ED @ unit_ED.t()).abs()
    others = len(unit_ED) * (len(unit_ED) - 1)
    return float((cosine_EE.sum() - cosine_EE.diagonal().sum()) / others)


@torch.no_grad()
def congestion(demand_E: Tensor, liking_E: Tensor) -> float | None:
    """gamma of the load shares r = softmax(q - gamma r), q the mean logits; None where it is not defined.

    By least squares of ``q - log r = gamma r + c`` over experts with a token: how much of an expert's liking
    it takes to bear one more share of the load.
    """
    used_E = (demand_E > 0) & liking_E.isfinite()
    if int(used_E.sum()) < _LEAST_EXPERTS:
        return None
    share = demand_E[used_E].double() / demand_E.sum()
    apart = share - share.mean()
    spread = float(apart.square().sum())
    if spread <= 1e-12 * float(share.square().sum()):
        return None
    gamma = float((apart * (liking_E[used_E].double() - share.log())).sum()) / spread
    return gamma if math.isfinite(gamma) else None
