"""Rounds: an assignment with more rows than a bound is split by tokens, and dispatched part by part.

Each round dispatches, computes and combines by itself and keeps only its input for backward, which computes
it again. So memory is bounded whatever the router does, and nothing is dropped.

Shapes: T tokens, D model, E experts, N assignments, M rounds, t tokens and n assignments of one round.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from moetrain.moe.assign import count, stable_order
from moetrain.moe.assignment import Assignment
from moetrain.ops.again import computed_again
from moetrain.ops.transfer import to_device


def round_starts(assignment: Assignment, num_tokens: int, max_rows: float) -> list[int]:
    """The first token of each round, from 0. A round has at most ``max_rows`` assignments, or one token.

    At most ``max_rows`` assignments in all are one round, without a wait; otherwise the host waits once.
    """
    starts = [0]
    if assignment.token_ids_N.shape[0] <= max_rows:
        return starts
    ends_T = count(assignment.token_ids_N, num_tokens).cumsum(0).tolist()
    while (begin := starts[-1]) < num_tokens:
        done = ends_T[begin - 1] if begin else 0
        starts.append(max(begin + 1, bisect_right(ends_T, done + max_rows, lo=begin)))
    return starts[:-1]


def in_rounds(
    x_TD: Tensor, assignment: Assignment, starts: list[int], compute: Callable[[Tensor, Assignment], Tensor]
) -> Tensor:
    """y [T, D]: the results of ``compute(x_tD, assignment of these tokens)`` of all rounds, concatenated.

    ``starts`` as of :func:`round_starts`. A start at T is a round without tokens, for a rank with fewer
    rounds than another: all ranks take part in each round's collectives.
    """
    parts = []
    for tokens, part in split(assignment, x_TD.shape[0], starts):
        x_tD = x_TD[tokens]
        if torch.is_grad_enabled():
            parts.append(computed_again(compute, x_tD, part))
        else:
            parts.append(compute(x_tD, part))
    return torch.cat(parts)


def split(assignment: Assignment, num_tokens: int, starts: list[int]) -> Iterator[tuple[slice, Assignment]]:
    """The tokens of each round and their assignments, whose token ids count from the round's first token.

    One host synchronisation.
    """
    tokens_N, num_experts = assignment.token_ids_N, assignment.num_experts
    starts_M = to_device(torch.tensor(starts), tokens_N.device)
    round_N = torch.bucketize(tokens_N.contiguous(), starts_M, right=True) - 1
    order_N = stable_order(round_N, len(starts))  # stays sorted by (expert, token) within a round
    cells_N = round_N * num_experts + assignment.expert_ids_N()
    counts_ME = count(cells_N, len(starts) * num_experts).view(-1, num_experts)
    host_counts_ME = counts_ME.tolist()
    ends_M = list(accumulate(map(sum, host_counts_ME)))
    for m, (first, last) in enumerate(zip(starts, [*starts[1:], num_tokens], strict=True)):
        here_n = order_N[ends_M[m - 1] if m else 0 : ends_M[m]]
        part = assignment.select(here_n, counts_ME[m], tuple(host_counts_ME[m]))
        yield slice(first, last), replace(part, token_ids_N=part.token_ids_N - first)
