"""Routing statistics over ranks: one all-reduce gives every rank the figures of the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moetrain.moe.assignment import Assignment
from moetrain.moe.routing import Routing
from moetrain.parallel.ranks import run_ranks
from moetrain.train.log.metrics import RoutingStats, RoutingSummary

EXPERTS = {1: 3, 4: 5}  # a layer's place -> its experts


def _routing(token_expert_T: list[int], experts: int, scale: float) -> Routing:
    order = sorted((e, t) for t, e in enumerate(token_expert_T))
    counts_E = torch.bincount(torch.tensor(token_expert_T), minlength=experts)
    scores_TE = torch.rand(len(order), experts, generator=torch.Generator().manual_seed(5)) * scale
    return Routing(
        assignment=Assignment(
            token_ids_N=torch.tensor([t for _, t in order]),
            weights_N=torch.ones(len(order)),
            counts_E=counts_E,
        ),
        num_tokens_B=torch.tensor([len(order)]),
        demand_BE=counts_E[None],
        scores_TE=scores_TE,
    )


def _records(choice: list[int]) -> dict[int, Routing]:
    first, second = EXPERTS.items()
    return {first[0]: _routing(choice, first[1], 1.0), second[0]: _routing(choice[::-1], second[1], 3.0)}


def _lists(summary: RoutingSummary) -> dict[int, list[int]]:
    return {layer: counts_E.tolist() for layer, counts_E in summary.counts.items()}


def _choices(rank: int) -> list[list[int]]:
    """What the tokens of ``rank`` choose in its two micro-batches; ranks hold different numbers of tokens."""
    return [[0, 1, 1][: rank + 1], [2, 0, 0, 0, 1][: 2 * rank + 1]]


def _stats(rank: int, world_size: int) -> tuple[dict[str, float], dict[int, list[int]], int]:
    stats = RoutingStats()
    for choice in _choices(rank):
        stats.add(_records(choice))
    calls = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), all_reduce(*args, **kwargs))[1]
    summary = stats.reduce(dist.group.WORLD)
    return summary.metrics(), _lists(summary), len(calls)


def _dense(rank: int, world_size: int) -> dict[str, float]:
    stats = RoutingStats()
    stats.add({})
    return stats.reduce(dist.group.WORLD).metrics()


def test_every_rank_gets_the_figures_of_all_tokens() -> None:
    results = run_ranks(_stats, 2)
    alone = RoutingStats()
    for rank in range(2):
        for choice in _choices(rank):
            alone.add(_records(choice))
    summary = alone.reduce()
    for metrics, counts, calls in results:
        assert metrics == pytest.approx(summary.metrics(), rel=1e-12)
        assert counts == _lists(summary)
        assert calls == 1


def test_ranks_of_a_dense_model_do_not_wait() -> None:
    assert run_ranks(_dense, 2) == [{}, {}]
