"""Verdicts as tables, and jobs as shares of a total."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from fuzz.catalogue import TARGETS
from fuzz.verdict import Verdict

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


def table(verdicts: Iterable[Verdict]) -> str:
    """A Markdown table: a row a target, a column a verdict that occurs; then the places of what is wrong."""
    verdicts = list(verdicts)
    counts = Counter((v.target, v.kind) for v in verdicts)
    kinds = [kind for kind in _KINDS if any(v.kind == kind for v in verdicts)]
    lines = [
        "| target | all | " + " | ".join(kinds) + " | mean | slowest |",
        "|---|" + "---:|" * (len(kinds) + 3),
    ]
    for target in dict.fromkeys(v.target for v in verdicts):
        own = [v for v in verdicts if v.target == target]
        mean, slowest = sum(v.seconds for v in own) / len(own), max(v.seconds for v in own)
        cells = " | ".join(str(counts[target, kind] or "") for kind in kinds)
        lines.append(f"| {target} | {len(own)} | {cells} | {mean:.2f} s | {slowest:.1f} s |")
    places = Counter((v.target, v.kind, v.place) for v in verdicts if not v.good)
    if places:
        lines += ["", "| target | verdict | place | times | a seed |", "|---|---|---|---:|---:|"]
    for (target, kind, place), count in places.most_common():
        seed = next(v.seed for v in verdicts if (v.target, v.kind, v.place) == (target, kind, place))
        lines.append(f"| {target} | {kind} | {place} | {count} | {seed} |")
    return "\n".join(lines)
