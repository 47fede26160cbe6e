"""What became of one mutation."""

from __future__ import annotations

from dataclasses import dataclass

GOOD = ("equal", "fits", "refused")  # the same values; others that nothing can tell; one line of an error
BEGUN = b"begun"  # what a worker says when all is ready to read a mutated file


@dataclass(frozen=True)
class Limits:
    """Of one mutation: ``seconds`` of processor and ``memory`` in bytes above what the process held before.

    ``grace`` seconds later it is killed: native code runs no handler of a signal. ``wall`` seconds end what
    waits and takes no processor; there are many of them, since a busy machine is slow.
    """

    seconds: float = 10.0
    grace: float = 5.0
    wall: float = 90.0
    memory: float = 2e9


@dataclass(frozen=True)
class Outcome:
    """``kind``: one of GOOD, or other, differs, hang, memory, crash, long, control, exit, leak.

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
