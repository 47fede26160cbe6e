"""Balanced assignment, exactly: from any balanced start, cancel cycles of moves that gain.

Shapes: T tokens, E experts. An assignment is the best one if and only if no cycle of moves between experts
gains (Klein 1967 for flows). With E experts the graph of best moves has E nodes, and one more where T is not
a multiple of E: through it an expert with the larger share may give a token to one with the smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moetrain.moe.solvers.auction import auction, finite_scores

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Solution:
    """expert_T int64; price_E is the dual that proves it: see :meth:`gap`."""

    expert_T: Ints
    price_E: Floats

    def gap(self, scores_TE: Floats) -> float:
        """Upper bound from the prices minus the total score: at most this much is missing to the best.

        For any prices no assignment with counts T // E or T // E + 1 scores more than
        ``sum_t max_e (s_te - p_e) + (T // E) sum_e p_e + the T % E largest p_e``.
        """
        tokens, num_experts = scores_TE.shape
        share, extra = divmod(tokens, num_experts)
        best = (scores_TE - self.price_E).max(axis=1, initial=-np.inf).sum() if tokens else 0.0
        bound = best + share * self.price_E.sum() + np.sort(self.price_E)[num_experts - extra :].sum()
        return float(bound - scores_TE[np.arange(tokens), self.expert_T].sum())


def balanced_assignment(scores_TE: Floats) -> Solution:
    """The assignment of the highest total score in which experts' counts differ by at most one.

    Scores are read as :func:`finite_scores` gives them. Ends: each round raises the total by more than a
    rounding error.
    """
    tokens, num_experts = scores_TE.shape
    if tokens == 0 or num_experts == 1:
        return Solution(np.zeros(tokens, dtype=np.int64), np.zeros(num_experts))
    scores = finite_scores(torch.from_numpy(np.ascontiguousarray(scores_TE)))
    scores_TE, scores = scores.numpy(), scores[None]
    spread = float(np.ptp(scores_TE))
    valid = torch.ones(1, tokens, dtype=torch.bool)
    start, _ = auction(scores, valid, max(spread / 200, 1e-30))
    expert_T: Ints = start[0].numpy()
    tolerance = 1e-13 * max(float(np.abs(scores_TE).max()), 1e-30)
    moves = _Moves(scores_TE, expert_T)
    while True:
        potential, parent = _longest_paths(moves.gain, tolerance)
        cycles = _cycles(parent)
        if not cycles:
            return Solution(expert_T, potential[:num_experts])
        for cycle in cycles:
            moves.follow(cycle)


class _Moves:
    """gain [n, n]: the best gain of moving one token from expert i to j, and which token that is."""

    def __init__(self, scores_TE: Floats, expert_T: Ints) -> None:
        self.scores, self.expert_T = scores_TE, expert_T
        self.num_experts = scores_TE.shape[1]
        self.share, self.extra = divmod(len(scores_TE), self.num_experts)
        size = self.num_experts + bool(self.extra)
        self.gain: Floats = np.full((size, size), -np.inf)
        self.token: Ints = np.zeros((self.num_experts, self.num_experts), dtype=np.int64)
        self._refresh(range(self.num_experts))

    def _refresh(self, experts: range | list[int]) -> None:
        columns = np.arange(self.num_experts)
        for e in experts:
            members = np.flatnonzero(self.expert_T == e)
            row = np.full(self.num_experts, -np.inf)
            if len(members):
                gains = self.scores[members] - self.scores[members, e, None]
                best = gains.argmax(axis=0)
                row, self.token[e] = gains[best, columns], members[best]
            row[e] = -np.inf
            self.gain[e, : self.num_experts] = row
            if self.extra:
                self.gain[e, -1] = 0.0 if len(members) == self.share else -np.inf
                self.gain[-1, e] = 0.0 if len(members) > self.share else -np.inf

    def follow(self, cycle: list[int]) -> None:
        """Move one token along each edge of the cycle; edges to and from the extra node move none."""
        pairs = list(zip(cycle, cycle[1:] + cycle[:1], strict=True))
        real = [(i, j) for i, j in pairs if max(i, j) < self.num_experts]
        tokens = [self.token[i, j] for i, j in real]
        for token, (_, j) in zip(tokens, real, strict=True):
            self.expert_T[token] = j
        self._refresh([e for e in cycle if e < self.num_experts])


def _longest_paths(gain: Floats, tolerance: float) -> tuple[Floats, Ints]:
    """(potentials, parents) after Bellman-Ford from everywhere; a cycle of parents is one that gains."""
    size = len(gain)
    potential, parent = np.zeros(size), np.full(size, -1, dtype=np.int64)
    columns = np.arange(size)
    for round_ in range(size + 1):
        reach = potential[:, None] + gain
        best = reach.argmax(axis=0)
        better = reach[best, columns] > potential + tolerance
        if not better.any():
            break
        potential = np.where(better, reach[best, columns], potential)
        parent = np.where(better, best, parent)
        if round_ % 4 == 3 and _cycles(parent):
            break
    return potential, parent


def _cycles(parent: Ints) -> list[list[int]]:
    """The disjoint cycles of a parent graph, each in the direction of its edges (parent to child)."""
    state = np.zeros(len(parent), dtype=np.int64)  # 0 new, else the walk that came by
    found = []
    for start in range(len(parent)):
        walk, node = [], start
        while node >= 0 and not state[node]:
            state[node] = start + 1
            walk.append(node)
            node = int(parent[node])
        if node >= 0 and state[node] == start + 1:
            found.append(walk[walk.index(node) :][::-1])
    return found
