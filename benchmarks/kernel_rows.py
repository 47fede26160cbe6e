"""What surrounds the feed-forward: the router, the rows' layout and the sums, beside torch's own ways.

Shapes: T tokens, D model, F hidden, P = 2F, E experts, k experts a token, N = T k, R block-aligned rows.
"""

from __future__ import annotations

import torch
from bounded import Bounded
from kernel_problem import Problem, Unit, random_rows
from torch import Tensor

from moetrain.kernels.combine import combine
from moetrain.kernels.metadata import lay_out
from moetrain.kernels.router.route import route
from moetrain.kernels.router.rule import Rule
from moetrain.kernels.twins import router as router_twin
from moetrain.moe.dispatch.plan import layout
from moetrain.ops.gather_sum import gather_sum


def sums(p: Problem) -> Unit:
    rows, way = random_rows(p, p.shape.d_model, 12), (p.rows.by_source_N, p.rows.ends_X)

    def reference() -> list[Bounded]:
        x_NkD = rows[p.rows.by_source_N].double().unflatten(0, (-1, p.shape.top_k))
        return [Bounded(x_NkD, torch.zeros_like(x_NkD)).sum(1).rounded(p.dtype)]

    return Unit(
        "combine", 0, lambda: [combine(rows, *way)], reference,
        {"torch": lambda: [gather_sum(rows, *way, p.rows.ids_R)]},
    )  # fmt: skip


def rows_laid_out(p: Problem) -> Unit:
    counts_E, block, tokens = p.rows.segments.counts_E, p.meta.block, p.shape.tokens

    def ours() -> list[Tensor]:
        made, _ = lay_out(p.sources_N, p.weights_N, counts_E, block, tokens)
        return [made.slots_N, made.by_source_N, made.ends_X]

    def by_torch() -> list[Tensor]:
        return list(vars(layout(p.sources_N, counts_E, None, tokens, block)[0]).values())

    expected = (p.slots_N, p.rows.by_source_N, p.rows.ends_X)
    return Unit("rows", 0, ours, lambda: [Bounded.exact(x) for x in expected], {"torch": by_torch})


def routed(p: Problem) -> Unit:
    """Ids are compared with the choice by the kernel's own scores: between two near ones rounding decides."""
    rule = Rule(p.shape.top_k)

    def ours() -> list[Tensor]:
        return list(route(p.logits_TE, None, rule))

    def reference() -> list[Bounded]:
        ids, _, scores = ours()
        wide = router_twin.softmax(p.logits_TE.double())
        relative = (2 * p.shape.experts + 64) * 2.0**-24
        weights = router_twin.weigh(wide, p.logits_TE.double(), ids, rule)
        return [
            Bounded.exact(router_twin.choose(scores, None, rule)),
            Bounded(weights, weights * 4 * relative), Bounded(wide, wide * relative),
        ]  # fmt: skip

    return Unit(
        "router", 0, ours, reference, {"torch": lambda: list(router_twin.route(p.logits_TE, None, rule))}
    )
