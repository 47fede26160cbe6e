"""Assignments that kernels must take: random, uneven, empty, one row, everything on one expert.

Shapes: E experts, N assignments, X source rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PRIMES = [p for p in range(2, 257) if all(p % d for d in range(2, p))]


@dataclass(frozen=True)
class Case:
    """The rows that each of E experts has, of X source rows; a token may choose any number of experts."""

    counts: tuple[int, ...]
    num_source: int

    def __str__(self) -> str:
        return f"X{self.num_source} E{len(self.counts)} N{sum(self.counts)}"


EDGES = (
    Case((0,), 3),  # nothing
    Case((0, 0, 1, 0), 1),  # one row
    Case((0, 0, 53, 0, 0), 53),  # all rows on one expert
    Case((16, 32, 0, 48), 61),  # whole blocks
    Case((17, 0, 31, 1, 15), 37),  # one more, one less
    Case((0, 0, 0), 0),  # no source
)


def random_case(seed: int, most_rows: int = 200, experts: int | None = None) -> Case:
    """Counts as of a router that prefers some experts, a third of which are empty."""
    g = torch.Generator().manual_seed(seed)
    experts = experts or int(torch.randint(1, 161, (1,), generator=g))
    num_source = PRIMES[int(torch.randint(0, len(PRIMES), (1,), generator=g))]
    popular_E = torch.rand(experts, generator=g).pow(4) * (torch.rand(experts, generator=g) > 0.33) + 1e-9
    rows = int(torch.randint(1, most_rows, (1,), generator=g))
    chosen = torch.multinomial(popular_E, rows, replacement=True, generator=g)
    return Case(tuple(chosen.bincount(minlength=experts).clamp(max=num_source).tolist()), num_source)


def assignment(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(token_ids_N, weights_N fp32, counts_E): each expert has different tokens, in ascending order."""
    g = torch.Generator().manual_seed(seed)
    tokens = [torch.randperm(case.num_source, generator=g)[:n].sort().values for n in case.counts]
    token_ids_N = torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int64)
    weights_N = torch.rand(token_ids_N.shape[0], generator=g) + 0.1
    counts_E = torch.tensor(case.counts, dtype=torch.int64)
    return token_ids_N.to(device), weights_N.to(device), counts_E.to(device)
