"""Ranks of one start find each other in a store that holds the keys of earlier ones."""

from __future__ import annotations

import re
import threading
import time

import pytest
from torch.distributed import HashStore

from moetrain.parallel import meeting
from moetrain.parallel.meeting import meet


class Start:
    """``world`` ranks in threads, of which some may come late or not at all."""

    def __init__(self, store: HashStore, world: int, late: dict[int, float], seconds: float = 20) -> None:
        self.prefixes: dict[int, str] = {}
        self.errors: dict[int, str] = {}
        self._store, self._world, self._seconds = store, world, seconds
        self._threads = [
            threading.Thread(target=self._join, args=(rank, late.get(rank, 0.0))) for rank in range(world)
        ]
        for thread in self._threads:
            thread.start()

    def _join(self, rank: int, late: float) -> None:
        time.sleep(max(0.0, late))
        if late < 0:
            return
        try:
            self.prefixes[rank] = meet(self._store, rank, self._world, self._seconds)
        except TimeoutError as error:
            self.errors[rank] = str(error)

    def wait(self) -> dict[int, str]:
        for thread in self._threads:
            thread.join()
        return self.prefixes


@pytest.mark.real
@pytest.mark.parametrize(
    "late", [{}, {0: 0.2}, {1: 0.2}, {2: 0.1, 0: 0.2}], ids=["none", "0", "1", "2 and 0"]
)
def test_every_start_has_a_prefix_of_its_own(late):
    store, seen = HashStore(), set()
    for world in (3, 3, 2, 4):
        found = Start(store, world, late).wait()
        assert sorted(found) == list(range(world))
        assert len(set(found.values())) == 1
        seen.add(found[0])
    assert len(seen) == 4


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_died_while_the_others_met_is_not_counted(dead):
    """A start in which a rank has said that it is here and no more; then all ranks of another."""
    store = HashStore()
    store.set(meeting._here(dead), "a dead one's token")
    first = Start(store, 3, {dead: -1}, seconds=0.3)
    assert first.wait() == {}
    found = Start(store, 3, {dead: 0.3}).wait()
    assert len(found) == 3
    assert len(set(found.values())) == 1


@pytest.mark.parametrize("absent", [0, 2])
def test_who_does_not_come_is_named(absent):
    start = Start(HashStore(), 3, {absent: -1}, seconds=0.2)
    assert start.wait() == {}
    assert set(start.errors.values()) == {f"rank(s) {absent} did not come"}
    many = Start(HashStore(), 40, dict.fromkeys(range(1, 40), -1.0), seconds=0.1)
    many.wait()
    assert re.fullmatch(r"rank\(s\) 1, 2, 3, 4, 5, 6, 7, 8, \.\.\. \(39\) did not come", many.errors[0])
