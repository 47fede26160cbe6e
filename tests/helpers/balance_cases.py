"""A loss by its name, and totals by what is counted, for tests of balance losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moetrain.moe import RouterContext, Routing, build_router
from moetrain.moe.balance import LossTerm, StepTotals

FORMS = ("switch", "gshard_first", "sum_over_k", "l1", "p_penalty")  # those of load shares


def balance_loss(routing: Routing, name: str, scope: str, totals: StepTotals, layer: int = 0) -> Tensor:
    return LossTerm(name, 1.0, scope).value(routing, totals, layer)


def z_loss(routing: Routing, totals: StepTotals) -> Tensor:
    return balance_loss(routing, "z", "micro", totals)


def step_totals(
    num_tokens: float,
    demand: Mapping[int, Tensor] | None = None,
    first: Mapping[int, Tensor] | None = None,
    running: Mapping[int, Tensor] | None = None,
) -> StepTotals:
    """``demand`` and ``first``: what was counted ahead for global_batch; ``running``: load shares."""
    found = {form: first if form == "gshard_first" else demand for form in FORMS}
    counts = {f"{form}_global_batch": by_layer for form, by_layer in found.items() if by_layer is not None}
    return StepTotals(num_tokens, counts, {} if running is None else {"running_load": running})


def routed(logits_TE: Tensor, batch: int = 1, valid_T: Tensor | None = None, **options: Any) -> Routing:
    """The top-k routing of these logits, differentiable in them."""
    tokens, num_experts = logits_TE.shape
    router = build_router("topk", d_model=num_experts, num_experts=num_experts, **options).to(logits_TE.dtype)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(num_experts))
    return router(logits_TE, replace(RouterContext.default(batch, tokens // batch), valid_T=valid_T))
