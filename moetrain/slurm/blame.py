"""Which nodes to leave out, from what each node and each pair of nodes found. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence


def blamed(
    nodes: Sequence[str], faults: Mapping[str, Sequence[str]], pairs: Collection[tuple[str, str]]
) -> dict[str, str]:
    """Node -> reason. ``faults``: of the nodes that reported; ``pairs``: those that did not reach each other.

    A node that said nothing is blamed, and so is one with a fault. Of the pairs that are left, the node of
    most of them goes first, until none is left: one bad node is in a pair with every other. Ties go to the
    later node, since the first one is where the job's own process runs.
    """
    found = {node: "said nothing" for node in nodes if node not in faults}
    found |= {node: "; ".join(faults[node]) for node in nodes if faults.get(node)}
    left = [pair for pair in pairs if not found.keys() & set(pair)]
    while left:
        counts = Counter(node for pair in left for node in pair)
        worst = max(counts, key=lambda node: (counts[node], nodes.index(node)))
        others = [other for pair in left if worst in pair for other in pair if other != worst]
        found[worst] = f"no sum with {', '.join(others)}"
        left = [pair for pair in left if worst not in pair]
    return found


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """All pairs of ``count`` members, in rounds in which each meets at most one other (circle method)."""
    members: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    found = []
    for _ in range(len(members) - 1):
        half = len(members) // 2
        meeting = zip(members[:half], reversed(members[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in meeting if a is not None and b is not None])
        members = [members[0], members[-1], *members[1:-1]]
    return found
