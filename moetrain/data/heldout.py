"""Which documents are held out: decided by each document's content, never by its place, seed or machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moetrain.data.documents import Part
from moetrain.errors import UserError

MAX_DOMAINS = 256  # a domain is a label to report by; more of them means that the column is not one


@dataclass(frozen=True)
class HeldOut:
    """The rule of one corpus. Identical documents always fall on the same side.

    A document is held out iff its 64-bit content key is under ``val_fraction`` of the range. A domain of at
    least two distinct documents that this leaves without one side gets it by ``exceptions``: its document of
    smallest key is held out, or that of largest key is not. A domain of one distinct document is trained on,
    unless all domains are such: then the smallest key of all is held out.
    """

    val_fraction: float
    exceptions: frozenset[int] = frozenset()

    def __call__(self, key: int) -> bool:
        return (key < self.val_fraction * 2.0**64) != (key in self.exceptions)


@dataclass
class Scan:
    """What one pass over a corpus found. ``domains`` are in the order of their first appearance."""

    held_out: HeldOut
    documents: int = 0
    train_bytes: int = 0  # before ``exceptions``, so close, not exact
    domains: list[str] = field(default_factory=list)


@dataclass
class _Extremes:
    low: int
    high: int


def scan(parts: Iterable[Part], val_fraction: float) -> Scan:
    """Read every document once, keeping two keys a domain. Raises UserError for an empty corpus."""
    rule = HeldOut(val_fraction)
    result = Scan(rule)
    extremes: dict[str, _Extremes] = {}
    for part in parts:
        before = result.documents
        for document in part.cleaned():
            key = document.key
            result.documents += 1
            if not rule(key):
                result.train_bytes += len(document.raw)
            seen = extremes.setdefault(document.domain, _Extremes(key, key))
            seen.low, seen.high = min(seen.low, key), max(seen.high, key)
            if len(extremes) > MAX_DOMAINS:
                raise UserError(
                    f"{part.label}: more than {MAX_DOMAINS} domains; "
                    "data.domain_key must name a column of labels"
                )
        if result.documents == before:
            raise UserError(f"{part.label} holds no text (0 documents that are not blank)")
    result.domains = list(extremes)
    result.held_out = HeldOut(val_fraction, frozenset(_exceptions(rule, list(extremes.values()))))
    return result


def _exceptions(rule: HeldOut, domains: Sequence[_Extremes]) -> set[int]:
    """The keys to flip. Domains of two distinct documents come last, so that one of them has both sides
    even where domains share a document.
    """
    flipped: set[int] = set()

    def held(key: int) -> bool:
        return rule(key) != (key in flipped)

    for seen in sorted(domains, key=lambda seen: seen.low != seen.high):
        if seen.low == seen.high:
            if held(seen.low):
                flipped ^= {seen.low}
        elif not held(seen.low):
            flipped ^= {seen.low}
        if seen.low != seen.high and held(seen.high):
            flipped ^= {seen.high}
    lowest = {seen.low for seen in domains}
    if len(lowest) > 1 and all(seen.low == seen.high for seen in domains):  # nothing is held out yet
        flipped ^= {min(lowest)}
    return flipped
