"""Operands of the experts' operator, and the bytes that autograd keeps.

Shapes: X source rows, D model, R rows (N useful), E experts, F hidden, P = 2F (gated) or F.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moetrain.moe.assignment import Assignment
from moetrain.moe.dispatch.plan import layout
from moetrain.moe.routing import Routing
from moetrain.ops import Rows


def rows_of(counts: list[int], num_source: int, block: int, seed: int = 0) -> Rows:
    """Rows of a random routing with these counts (none above ``num_source``)."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randperm(num_source, generator=generator)[:c].sort().values for c in counts]
    counts_E = torch.tensor(counts)
    token_ids_N = torch.cat(ids)
    assignment = Assignment(token_ids_N, torch.ones(len(token_ids_N)), counts_E)
    Routing(assignment=assignment, num_tokens_B=torch.tensor([num_source]), demand_BE=counts_E[None]).check()
    return layout(
        assignment.token_ids_N,
        assignment.counts_E,
        assignment.counts_E.tolist(),
        num_source,
        block,
    )[0]


def operands(
    rows: Rows, num_source: int, d: int, f: int, dtype: torch.dtype = torch.float64, gated: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(source, row weights, up, down), leaves; padding rows weigh 0."""
    torch.manual_seed(1)
    experts = rows.segments.num_experts
    source = torch.randn(num_source, d, dtype=dtype, requires_grad=True)
    weights = (torch.rand(len(rows.ids_R), dtype=dtype) * (rows.ids_R >= 0)).requires_grad_()
    up = torch.randn(experts, d, f * (2 if gated else 1), dtype=dtype, requires_grad=True)
    down = torch.randn(experts, f, d, dtype=dtype, requires_grad=True)
    return source, weights, up, down


@contextmanager
def saved_bytes() -> Iterator[dict[int, int]]:
    """Bytes that autograd keeps, by storage: a tensor that is kept twice takes its memory once."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept
