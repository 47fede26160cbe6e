"""A bound on rows: a Routing with more assignments than that runs in rounds of whole tokens.

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
from torch.utils.checkpoint import checkpoint

from moetrain.moe.assign import count, stable_order
from moetrain.moe.routing import Routing
from moetrain.ops.transfer import to_device

_PER_ASSIGNMENT = ("weights_N", "forward_scale_N", "choice_N")


def round_starts(routing: Routing, num_tokens: int, max_rows: float) -> list[int]:
    """The first token of each round, from 0: as many tokens as have ``max_rows`` assignments, at least one.

    No more than ``max_rows`` in all are one round, without a look at them; else one host synchronisation.
    """
    starts = [0]
    if routing.token_ids_N.shape[0] <= max_rows:
        return starts
    ends_T = count(routing.token_ids_N, num_tokens).cumsum(0).tolist()
    while (begin := starts[-1]) < num_tokens:
        done = ends_T[begin - 1] if begin else 0
        starts.append(max(begin + 1, bisect_right(ends_T, done + max_rows, lo=begin)))
    return starts[:-1]


def in_rounds(
    x_TD: Tensor, routing: Routing, starts: list[int], compute: Callable[[Tensor, Routing], Tensor]
) -> Tensor:
    """y [T, D]: ``compute(x_tD, routing of these tokens)`` of each round, put together.

    ``starts`` as of :func:`round_starts`; a start at T is a round without tokens, which a rank makes to keep
    company with ranks that have more.
    """
    parts = []
    for tokens, part in split(routing, x_TD.shape[0], starts):
        x_tD = x_TD[tokens]
        if torch.is_grad_enabled():
            parts.append(checkpoint(compute, x_tD, part, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(compute(x_tD, part))
    return torch.cat(parts)


def split(routing: Routing, num_tokens: int, starts: list[int]) -> Iterator[tuple[slice, Routing]]:
    """The tokens of each round and their part of ``routing``, which has what a dispatcher reads.

    Token ids count from 0; scores and the like stay behind. One host synchronisation.
    """
    tokens_N, num_experts = routing.token_ids_N, routing.num_experts
    starts_M = to_device(torch.tensor(starts), tokens_N.device)
    round_N = torch.bucketize(tokens_N, starts_M, right=True) - 1
    order_N = stable_order(round_N, len(starts))  # stays sorted by (expert, token) within a round
    cells_N = round_N * num_experts + routing.expert_ids_N()
    counts_ME = count(cells_N, len(starts) * num_experts).view(-1, num_experts)
    values = {name: v for name in _PER_ASSIGNMENT if (v := getattr(routing, name)) is not None}
    host_counts_ME = counts_ME.tolist()
    ends_M = list(accumulate(map(sum, host_counts_ME)))
    for m, (first, last) in enumerate(zip(starts, [*starts[1:], num_tokens], strict=True)):
        here_n = order_N[ends_M[m - 1] if m else 0 : ends_M[m]]
        part = replace(
            routing,
            token_ids_N=tokens_N[here_n] - first,
            counts_E=counts_ME[m],
            host_counts=tuple(host_counts_ME[m]),
            scores_TE=None,
            logits_TE=None,
            valid_T=None,
            load_TE=None,
            repaired_E=None,
            stats=None,
            penalty=None,
            **{name: value.gather(0, here_n) for name, value in values.items()},
        )
        yield slice(first, last), part
