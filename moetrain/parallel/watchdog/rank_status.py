"""The status of a rank, as it is sent to the other ranks: JSON of a few hundred bytes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

ALL_DONE = "all done"  # ``ended`` of a rank that ends without an error


@dataclass(frozen=True)
class Place:
    """A collective that a rank is in: the ``number``-th of ``group`` that it entered, counted from 1.

    ``patient``: only silence of a rank ends the wait, not its length. ``sent`` and ``received``: rows by rank
    of the group; empty if every rank has equally many. ``row_bytes``: bytes of one row.
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
class RankStatus:
    """The current activity of a rank.

    phase    what its collectives belong to, such as ``step 8``.
    place    the collective that it is in; None outside any.
    seconds  how long it has been there.
    last     title of the collective that it left last; empty if it has left none.
    counts   a group's key -> how many collectives of the group it has entered.
    ended    why the rank is ending; empty while it runs.
    """

    phase: str
    place: Place | None
    seconds: float
    last: str
    counts: dict[str, int]
    ended: str = ""

    def has_entered(self, place: Place) -> bool:
        """Whether the rank has entered that collective of the group, or a later one."""
        return self.counts.get(place.group, 0) >= place.number

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> RankStatus:
        fields: dict[str, Any] = json.loads(text)
        place = fields.pop("place")
        return RankStatus(place=None if place is None else Place(**place), **fields)

    def __str__(self) -> str:
        if self.ended:
            return f"ending: {self.ended}"
        if self.place is not None:
            return f"{self.phase}, in {self.place.title} for {self.seconds:.1f} s"
        after = f", after {self.last}" if self.last else ""
        return f"{self.phase}, in no collective for {self.seconds:.1f} s{after}"
