"""When a run must end, and the report's words; the threads and the store: tests/dist/test_watchdog.py."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from moetrain.moe.dispatch.collectives import Collective
from moetrain.parallel.watchdog import flight_recorder
from moetrain.parallel.watchdog.diagnosis import Peer, View, diagnose, report
from moetrain.parallel.watchdog.flight_recorder import Clock, FlightRecorder
from moetrain.parallel.watchdog.rank_status import Place, RankStatus

TIMEOUT = 7.0
COUNTS = Place("blocks.1.feed_forward", "counts", "all_to_all", False, "ep/0", 5, False, [], [], 24)
ROWS = replace(COUNTS, name="rows", sent=[3, 11], received=[3, 2], row_bytes=64)
SUM = Place("", "the losses", "all_reduce", False, "0/0", 9, False, [], [], 0)
BUSY = RankStatus("step 8", None, 1.5, "the losses (all_reduce)", {"ep/0": 4, "0/0": 8})


def at(place: Place, seconds: float = 1.0, phase: str = "step 8", **counts: int) -> RankStatus:
    """In ``place`` for ``seconds``, and as far in the other group as BUSY."""
    return RankStatus(phase, place, seconds, "", BUSY.counts | {place.group: place.number} | counts)


def view(own: RankStatus, *others: Peer, unreachable: float = 0.0) -> View:
    """Rank 0's, all ranks being members of its group."""
    peers = dict(enumerate(others, start=1))
    return View(0, own, peers, range(len(others) + 1), unreachable, sure=4.0)


def test_waiting_in_a_collective_counts_and_nothing_else():
    late = Peer(BUSY, 0.3)
    assert diagnose(view(at(COUNTS, 7.1), late), TIMEOUT) == "waited 7.1 s (parallel.timeout=7)"
    assert diagnose(view(at(COUNTS, 6.9), late), TIMEOUT) is None
    assert diagnose(view(replace(BUSY, seconds=1e6), late), TIMEOUT) is None
    assert diagnose(view(replace(BUSY, seconds=1e6), Peer(BUSY, 1e6)), TIMEOUT) is None  # nobody waits for it


def test_a_long_wait_that_is_known_ends_by_silence_alone():
    place = replace(SUM, name="saving a checkpoint", kind="", patient=True)
    beating, silent = Peer(BUSY, 3.0), Peer(BUSY, 7.2)
    assert diagnose(view(at(place, 1e6), beating), TIMEOUT) is None
    assert diagnose(view(at(place, 8.0), beating, silent), TIMEOUT) == (
        "rank 2 silent for longer than parallel.timeout=7 s"
    )


def test_a_store_that_refuses_connections_ends_the_run_soon():
    assert diagnose(replace(view(BUSY, unreachable=3.9), refused=3.9), TIMEOUT) is None
    said = diagnose(replace(view(BUSY, unreachable=4.1), refused=4.1), TIMEOUT)
    assert said == "the store is gone, and with it the launcher or the rank that held it"


def test_a_store_that_does_not_answer_ends_the_run():
    assert diagnose(view(BUSY, unreachable=6.9), TIMEOUT) is None
    assert diagnose(view(BUSY, unreachable=7.5), TIMEOUT) == (
        "the store has not answered for 7.5 s (parallel.timeout=7)"
    )


@pytest.mark.parametrize(
    "other",
    [
        at(replace(COUNTS, layer="blocks.0.feed_forward")),
        at(replace(COUNTS, name="results")),
        at(COUNTS, phase="step 9"),
        at(replace(COUNTS, backward=True)),
    ],
)
def test_the_same_number_of_a_group_must_be_the_same_collective(other):
    said = diagnose(view(at(COUNTS), Peer(other, 0.1)), TIMEOUT)
    assert said == (
        "out of step: rank 0 is in step 8, blocks.1.feed_forward, counts (all_to_all, forward), "
        f"rank 1 in {other.phase}, {other.place.title}"
    )
    assert "rank 1: not arrived" in report(view(at(COUNTS), Peer(other, 0.1)), said)[-1]


def test_a_rank_that_is_behind_or_ahead_is_in_step():
    for number in (4, 6):
        other = at(replace(COUNTS, name="results", number=number), 1e3)
        assert diagnose(view(at(COUNTS), Peer(other, 0.1)), TIMEOUT) is None


def test_splits_that_differ_are_named():
    other = at(replace(ROWS, sent=[2, 1], received=[11, 1]))
    assert diagnose(view(at(ROWS), Peer(other, 0.1)), TIMEOUT) is None
    other = at(replace(ROWS, sent=[5, 1], received=[11, 1]))
    assert diagnose(view(at(ROWS), Peer(other, 0.1)), TIMEOUT) == (
        "splits differ: rank 0 expects 2 rows of rank 1, which sends 5"
    )


def test_two_ranks_that_wait_for_one_another_are_out_of_step():
    own, other = at(COUNTS, 5.0), at(SUM, 5.0)
    said = diagnose(view(own, Peer(other, 0.1)), TIMEOUT)
    assert said is not None
    assert said.startswith("out of step: rank 0 is in step 8, blocks.1")
    assert diagnose(view(replace(own, seconds=3.0), Peer(other, 0.1)), TIMEOUT) is None  # not sure yet
    # One that waits for others than this rank, or has been where this rank is, may get on.
    assert diagnose(view(replace(own, counts={"ep/0": 5}), Peer(other, 0.1)), TIMEOUT) is None
    assert diagnose(view(own, Peer(replace(other, counts={"ep/0": 5, "0/0": 9}), 0.1)), TIMEOUT) is None


def test_the_report_says_who_is_missing_and_where():
    others = [
        Peer(BUSY, 0.4),
        Peer(at(ROWS, 2.0), 0.2),
        Peer(replace(BUSY, ended="disk full"), 30.0),
        Peer(None, 9.0),
        Peer(BUSY, 9.0),
    ]
    busy = "step 8, in no collective for 1.5 s, after the losses (all_reduce)"
    assert report(view(at(ROWS, 7.1), *others), "waited 7.1 s") == [
        "step 8, blocks.1.feed_forward, rows (all_to_all, forward): waited 7.1 s",
        "splits by rank 0, 1, 2, 3, 4, 5: sends 3, 11 rows of 64 bytes, expects 3, 2",
        f"rank 1: not arrived, last heard of 0.4 s ago: {busy}",
        "rank 3: not arrived, last heard of 30.0 s ago: ending: disk full",
        "rank 4: lost (killed, stopped or cut off), never heard of",
        f"rank 5: lost (killed, stopped or cut off), last heard of 9.0 s ago: {busy}",
    ]


def test_the_report_of_a_rank_in_no_collective_and_of_many_ranks():
    told = report(view(BUSY, Peer(at(SUM, 7.1), 0.4)), "the run was ended by rank 1: waited")
    assert told == [
        "the run was ended by rank 1: waited; "
        "here: step 8, in no collective for 1.5 s, after the losses (all_reduce)",
        "rank 1: last heard of 0.4 s ago: step 8, in the losses (all_reduce) for 7.1 s",
    ]
    many = report(view(at(SUM), *[Peer(BUSY, 0.1)] * 10), "waited")
    assert many[-1] == "and ranks 9, 10"
    assert len(many) == 10


def test_a_status_survives_its_json():
    for status in (BUSY, at(ROWS), replace(BUSY, ended='a "b"\n')):
        assert RankStatus.from_json(status.to_json()) == status


def test_the_clock_leaves_out_what_the_process_slept(monkeypatch):
    times = iter([100.0, 100.5, 700.5, 701.0])
    monkeypatch.setattr(flight_recorder.time, "monotonic", lambda: next(times))
    clock = Clock(longest=2.0)
    seen = []
    for _ in range(3):
        clock.tick()
        seen.append(clock.now)
    assert seen == [0.5, 2.5, 3.0]


def test_the_recorder_has_the_innermost_and_the_failed_entry(monkeypatch):
    monkeypatch.setattr(flight_recorder, "members", lambda group: [2, 3])
    group = SimpleNamespace(group_name="ep")
    recorder = FlightRecorder(Clock(1.0))
    recorder.phase = "step 8"

    def entry(name: str) -> flight_recorder.Entry:
        return flight_recorder.Entry(
            recorder, Collective("blocks.1", name, "all_to_all", group, [1, 2], (), 8)
        )

    def status() -> RankStatus:
        return recorder.status(recorder.current)

    with entry("outer"):
        recorder.clock.now = 3.0
        with entry("inner"):
            recorder.clock.now = 5.0
            inner = status()
        assert status().place.name == "outer"
        assert status().seconds == 5.0
    assert (inner.place.title, inner.place.number, inner.seconds) == (
        "blocks.1, inner (all_to_all, forward)",
        2,
        2.0,
    )
    assert inner.place.sent == [1, 2]
    outside = status()
    assert (outside.place, outside.last, outside.counts) == (
        None,
        "blocks.1, outer (all_to_all, forward)",
        {"ep/2": 2},
    )
    with pytest.raises(RuntimeError), entry("broken"):
        raise RuntimeError("closed")
    assert recorder.current is None
    assert recorder.failed.collective.name == "broken"
