"""Outcomes as tables, and jobs as shares of a total."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from fuzz.catalogue import TARGETS
from fuzz.outcome import Outcome

_KINDS = (
    "equal",
    "fits",
    "refused",
    "other",
    "differs",
    "hang",
    "memory",
    "crash",
    "long",
    "control",
    "exit",
    "leak",
)


def jobs(total: int, start: int = 0) -> Iterator[tuple[str, int]]:
    """``total`` mutations, split among the targets by their shares, target by target."""
    shares = sum(target.share for target in TARGETS.values())
    for target in TARGETS.values():
        for seed in range(start, start + max(1, round(total * target.share / shares))):
            yield target.name, seed


def table(outcomes: Iterable[Outcome]) -> str:
    """A Markdown table: a row a target, a column an outcome that occurs; then the places of what is wrong."""
    outcomes = list(outcomes)
    counts = Counter((one.target, one.kind) for one in outcomes)
    kinds = [kind for kind in _KINDS if any(one.kind == kind for one in outcomes)]
    lines = [
        "| target | all | " + " | ".join(kinds) + " | mean | slowest |",
        "|---|" + "---:|" * (len(kinds) + 3),
    ]
    for target in dict.fromkeys(one.target for one in outcomes):
        own = [one for one in outcomes if one.target == target]
        mean, slowest = sum(one.seconds for one in own) / len(own), max(one.seconds for one in own)
        cells = " | ".join(str(counts[target, kind] or "") for kind in kinds)
        lines.append(f"| {target} | {len(own)} | {cells} | {mean:.2f} s | {slowest:.1f} s |")
    places = Counter((one.target, one.kind, one.place) for one in outcomes if not one.good)
    if places:
        lines += ["", "| target | outcome | place | times | a seed |", "|---|---|---|---:|---:|"]
    for (target, kind, place), count in places.most_common():
        seed = next(
            one.seed for one in outcomes if (one.target, one.kind, one.place) == (target, kind, place)
        )
        lines.append(f"| {target} | {kind} | {place} | {count} | {seed} |")
    return "\n".join(lines)
