"""What is summed over a step of one layer's routing.

Shapes: T tokens, B sequences, E experts, N assignments, C = 2E + 8 sums: kept_E, demand_E, granted, entropy,
tokens with scores, squares of logits, tokens with logits, tokens, chunks, experts in use in them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.routing import Routing, RoutingRecord

CHUNK = 8  # neighbouring tokens whose experts are counted together, as BlockFFN's paper reports
SUMS = 8  # besides two for each expert


def sums_C(r: RoutingRecord) -> Tensor:
    """[C], fp64, on the record's device; nothing waits for it."""
    tokens = r.num_tokens.double()
    entropy, scored = tokens.new_zeros(()), tokens.new_zeros(())
    if r.scores_TE is not None:
        entropy, scored = _entropy(r.scores_TE, r.valid_T), tokens
    squares, with_logits = tokens.new_zeros(()), tokens.new_zeros(())
    if r.logits_TE is not None:
        squares, with_logits = _squares(r.logits_TE, r.valid_T), tokens
    granted = r.granted_E.sum().double()
    sums = torch.stack([granted, entropy, scored, squares, with_logits, tokens, *_chunks(r)])
    return torch.cat([r.computed_E.double(), r.demand_E.double(), sums])


def _chunks(r: RoutingRecord) -> tuple[Tensor, Tensor]:
    """How many runs of ``CHUNK`` valid tokens there are, cut from each sequence's first token on, and how
    many experts they use in all; fp64 scalars, 0 where a record has no assignment, or nothing by token."""
    none, batch = r.num_tokens.new_zeros((), dtype=torch.float64), r.num_tokens_B.shape[0]
    of_tokens = next((t for t in (r.scores_TE, r.logits_TE, r.valid_T) if t is not None), None)
    if not isinstance(r, Routing) or not batch or of_tokens is None:
        return none, none
    tokens_N, seq = r.assignment.token_ids_N, of_tokens.shape[0] // batch
    if not (whole := seq // CHUNK):
        return none, none
    valid_BC = torch.ones(batch, whole, dtype=torch.bool, device=tokens_N.device)
    if r.valid_T is not None:
        valid_BC = r.valid_T.view(batch, seq)[:, : whole * CHUNK].unflatten(1, (whole, CHUNK)).all(-1)
    chunk_N = (tokens_N % seq // CHUNK).clamp(max=whole)  # the last: of a rest
    cell_N = (tokens_N // seq * (whole + 1) + chunk_N) * r.num_experts + r.assignment.expert_ids_N()
    cells = torch.zeros(batch * (whole + 1) * r.num_experts, dtype=torch.bool, device=tokens_N.device)
    used_BCE = cells.scatter_(0, cell_N, True).view(batch, whole + 1, -1)[:, :whole]
    return valid_BC.sum().double(), (used_BCE & valid_BC[..., None]).sum().double()


def _squares(logits_TE: Tensor, valid_T: Tensor | None) -> Tensor:
    """Sum over valid tokens of the mean over experts of the squared logits; masked ones (-inf) count as 0."""
    square_T = logits_TE.masked_fill(~logits_TE.isfinite(), 0.0).double().square().mean(-1)
    total: Tensor = (square_T if valid_T is None else square_T.masked_fill(~valid_T, 0.0)).sum()
    return total


def _entropy(scores_TE: Tensor, valid_T: Tensor | None) -> Tensor:
    """Sum over valid tokens of the entropy, in nats, of the scores normalised to sum 1. fp64 scalar.

    With s the scores and Z their sum, H = ln Z - (sum s ln s) / Z. A token without any score counts as 0.
    """
    total_T = scores_TE.sum(-1)
    entropy_T = torch.log(total_T) - torch.special.xlogy(scores_TE, scores_TE).sum(-1) / total_T
    unused_T = total_T == 0 if valid_T is None else (total_T == 0) | ~valid_T
    total: Tensor = entropy_T.masked_fill(unused_T, 0.0).double().sum()
    return total
