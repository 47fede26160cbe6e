"""The section ``model.lora``: low-rank products beside a decoder's matrices."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Optional

from moetrain.bounds import above, at_least, within

_RANK = at_least(1, 2**31 - 1)
TARGETS = (
    "*.attention.w_*",
    "*.feed_forward.w_*",
    "*.dense.w_*",
    "*.shared.w_*",
    "*.experts.w_*",
)


@dataclass(frozen=True)
class LoraConfig:
    """``alpha / rank`` multiplies a product, ``alpha / sqrt(rank)`` with ``rslora`` (Kalajdzievski 2023,
    arXiv:2312.03732).

    ``targets``: patterns of the names of matrices inside blocks, as a shell's, each with a rank of its own if
    ``=RANK`` follows; the first that matches a name decides.
    """

    rank: Optional[int] = field(default=None, metadata=_RANK)  # null: no products
    alpha: float = field(default=16.0, metadata=above(0))
    targets: tuple[str, ...] = TARGETS
    # of what a product reads, in training
    dropout: float = field(default=0.0, metadata=within(0, 1, open_high=True))
    rslora: bool = False

    def rank_of(self, name: str) -> int | None:
        """The rank of the product beside the matrix ``name``; None: it has none."""
        if self.rank is None:
            return None
        for target in self.targets:
            pattern, rank = split_target(target)
            if fnmatchcase(name, pattern):
                return rank or self.rank
        return None

    def factor(self, rank: int) -> float:
        """What multiplies a product of that rank."""
        return float(self.alpha / (rank**0.5 if self.rslora else rank))


def split_target(target: str) -> tuple[str, int | None]:
    """Its pattern, and its own rank. Raises ValueError for what follows ``=`` and is no rank."""
    pattern, mark, rank = target.partition("=")
    if not mark:
        return pattern, None
    if not rank.isascii() or not rank.isdigit() or int(rank) < 1:
        raise ValueError(
            f"{target}: {rank or 'nothing'} is no rank; write PATTERN=RANK, with a rank of 1 or more"
        )
    return pattern, int(rank)
