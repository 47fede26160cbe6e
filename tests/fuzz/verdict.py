"""What became of one mutation."""

from __future__ import annotations

from dataclasses import dataclass

GOOD = ("equal", "fits", "refused")  # the same values; others that nothing can tell; one line of an error
SECONDS = 10.0  # of processor for one mutation
WALL_SECONDS = 90.0  # a busy machine takes longer, a wait takes no processor
MEMORY = 2 * 10**9  # bytes above what the process held before


@dataclass(frozen=True)
class Verdict:
    """``kind``: one of GOOD, or other, differs, hang, memory, crash, lines, long, control, exit, leak.

    ``place``: the innermost line of moetrain, and the exception; ``note``: the mutation in words.
    """

    target: str
    seed: int
    kind: str
    place: str = ""
    says: str = ""
    note: str = ""
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return self.kind in GOOD

    def line(self) -> str:
        return f"{self.target} {self.seed}: {self.kind} {self.place} {self.says[:200]!r} [{self.note[:200]}]"
