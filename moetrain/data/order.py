"""The order of samples: position i of a run -> sequence, computed in O(1) memory for any i.

A permutation of n items is a Feistel network over the next power of four, walked until it lands below n
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Nothing is stored, so nothing depends
on ranks, micro-batches or interruptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moetrain.data.documents import digest_of

Ints = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]
_ROUNDS = 6
BLOCK = 1024  # positions over which a mixture's weights hold exactly


class Order(Protocol):
    """``order(positions)`` gives the sequence of each position. ``description`` leaves the seed out."""

    @property
    def seed(self) -> int: ...
    @property
    def description(self) -> str: ...

    def __call__(self, positions: Ints) -> Ints: ...


class SampleOrder:
    """Positions e*n to e*n + n - 1 (epoch e) visit each of the n sequences once, each epoch anew."""

    def __init__(self, num_sequences: int, seed: int) -> None:
        if num_sequences < 1:
            raise ValueError(f"an order needs at least one sequence, not {num_sequences}")
        self.num_sequences = num_sequences
        self.seed = seed
        self.description = digest_of("uniform", num_sequences)

    def __call__(self, positions: Ints) -> Ints:
        epochs, within = np.divmod(positions, self.num_sequences)
        return _permute(within, _keys(self.seed, epochs), self.num_sequences)


class MixtureOrder:
    """Draws part p in proportion to ``weights[p]``: exactly ``quotas[p]`` of every 1024 positions in a row.

    Quotas are the weights' shares of 1024 rounded by largest remainder, at least 1. Within a part, sequences
    follow a SampleOrder of their own; parts wrap around independently. Sequences are numbered part by part.
    """

    def __init__(self, part_lengths: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.seed = seed
        self.quotas = _quotas(weights)
        self._quota_ends = np.cumsum(self.quotas)
        self._offsets = np.cumsum([0, *part_lengths])[:-1]
        part_seeds = _mix(_keys(seed, np.arange(len(part_lengths)))).tolist()
        self._orders = [SampleOrder(n, key) for n, key in zip(part_lengths, part_seeds, strict=True)]
        self.description = digest_of("mixture", list(part_lengths), self.quotas)

    def __call__(self, positions: Ints) -> Ints:
        blocks, within = np.divmod(positions, BLOCK)
        slots = _permute(within, _keys(self.seed, blocks), BLOCK)
        parts = np.searchsorted(self._quota_ends, slots, side="right")
        sequences = np.empty_like(slots)
        for part, order in enumerate(self._orders):
            chosen = np.flatnonzero(parts == part)
            first = self._quota_ends[part] - self.quotas[part]
            turn = blocks[chosen] * self.quotas[part] + slots[chosen] - first
            sequences[chosen] = order(turn) + self._offsets[part]
        return sequences


def _quotas(weights: Sequence[float]) -> list[int]:
    if len(weights) > BLOCK or not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"a mixture needs 1 to {BLOCK} positive weights, not {list(weights)}")
    shares = [weight / sum(weights) * BLOCK for weight in weights]
    quotas = [max(1, int(share)) for share in shares]
    while sum(quotas) < BLOCK:
        lacking = [share - quota for share, quota in zip(shares, quotas, strict=True)]
        quotas[lacking.index(max(lacking))] += 1
    while sum(quotas) > BLOCK:  # tiny weights were raised to 1; the largest part pays
        quotas[quotas.index(max(quotas))] -= 1
    return quotas


def _permute(values: Ints, keys: _Words, n: int) -> Ints:
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    out = _feistel(values.astype(np.uint64), keys, half)
    while (outside := np.flatnonzero(out >= np.uint64(n))).size:
        out[outside] = _feistel(out[outside], keys[outside], half)
    return out.astype(np.int64)


def _feistel(values: _Words, keys: _Words, half: np.uint64) -> _Words:
    """A bijection of 2 * half bits for each key."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for step in range(1, _ROUNDS + 1):
        left, right = right, left ^ (_mix(_mix(keys + np.uint64(step)) + right) & mask)
    joined: _Words = (left << half) | right
    return joined


def _keys(seed: int, numbers: Ints) -> _Words:
    """One 64-bit key per (seed, number)."""
    return _mix(_mix(_word(seed)) + numbers.astype(np.uint64))


def _word(seed: int) -> _Words:
    return np.array([seed & (2**64 - 1)], np.uint64)


def _mix(x: _Words) -> _Words:
    """splitmix64's finaliser (Steele, Lea and Flood 2014); array arithmetic wraps modulo 2**64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: _Words = x ^ (x >> np.uint64(31))
    return mixed
