"""A rank's place in the run, as it travels to the other ranks: JSON of a few hundred bytes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

ALL_DONE = "all done"  # what a rank says that ends as it should


@dataclass(frozen=True)
class Place:
    """A collective that a rank is in: the ``number``-th that it entered of ``group``, from 1.

    ``sent`` and ``received`` are rows by rank of the group, empty where every rank has as many.
    """

    layer: str
    name: str
    kind: str
    backward: bool
    group: str
    number: int
    patient: bool
    sent: list[int]
    received: list[int]
    row_bytes: int

    @property
    def title(self) -> str:
        """``blocks.1.feed_forward, counts (all_to_all, forward)``."""
        way = ["backward" if self.backward else "forward"] if self.layer else []
        how = ", ".join([self.kind, *way] if self.kind else way)
        name = f"{self.layer}, {self.name}" if self.layer else self.name
        return f"{name} ({how})" if how else name


@dataclass(frozen=True)
class Position:
    """Where a rank is: ``place``, or outside any collective, ``seconds`` long, having left ``last`` before.

    ``counts`` are the collectives it has entered, by group; ``ended`` why it is leaving, empty while it runs.
    """

    phase: str
    place: Place | None
    seconds: float
    last: str
    counts: dict[str, int]
    ended: str = ""

    def has_entered(self, place: Place) -> bool:
        return self.counts.get(place.group, 0) >= place.number

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> Position:
        fields: dict[str, Any] = json.loads(text)
        place = fields.pop("place")
        return Position(place=None if place is None else Place(**place), **fields)

    def __str__(self) -> str:
        if self.ended:
            return f"ending: {self.ended}"
        if self.place is not None:
            return f"{self.phase}, in {self.place.title} for {self.seconds:.1f} s"
        after = f", after {self.last}" if self.last else ""
        return f"{self.phase}, in no collective for {self.seconds:.1f} s{after}"
