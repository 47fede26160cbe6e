"""What each rank of a run does, since when, and what went wrong last: from the ranks' files, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from moetrain.parallel.watchdog.rank_record import RankRecord
from moetrain.report.tables import NOTHING, Table, duration, whole

_LISTED = 32  # ranks; those that do not run first
_ALIVE = "running"


def newest_start(records: Sequence[RankRecord]) -> list[RankRecord]:
    """Without those of an earlier start with more ranks."""
    if not records:
        return []
    world = max(records, key=lambda record: record.start).world
    return [record for record in records if record.rank < world]


def state_of_all(records: Sequence[RankRecord], now: float) -> str:
    """One phrase: ``running on`` all of them, or how many ranks are in which state."""
    states = Counter("ended" if record.ended else record.state(now) for record in records)
    if set(states) == {_ALIVE}:
        return f"running on {len(records)} rank(s)"
    counted = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return f"{counted}, of {max(record.world for record in records)} rank(s)"


def rank_table(records: Sequence[RankRecord], now: float) -> Table:
    """A row a rank; empty where all have ended, and with nothing wrong."""
    if all(record.ended and record.ended != record.wrong for record in records):
        return []
    ordered = sorted(records, key=lambda record: (record.state(now) == _ALIVE, record.rank))
    head = ["rank", "state", "tokens/s", "heard of", "was doing", "for", "process"]
    rows = [_row(record, now) for record in ordered[:_LISTED]]
    more = len(ordered) - _LISTED
    return [head, *rows, *([[f"and {more} more", *[""] * (len(head) - 1)]] if more > 0 else [])]


def last_wrong(records: Sequence[RankRecord], now: float) -> str | None:
    """What went wrong last on any rank, in this start or an earlier one."""
    wrong = [record for record in records if record.wrong]
    if not wrong:
        return None
    last = max(wrong, key=lambda record: record.wrong_at)
    what = last.wrong.removeprefix(f"rank {last.rank}: ")  # as ranks' own reports begin
    return f"went wrong last, {duration(max(0.0, now - last.wrong_at))} ago: rank {last.rank}: {what}"


def _row(record: RankRecord, now: float) -> list[str]:
    return [
        str(record.rank),
        "ended" if record.ended else record.state(now),
        NOTHING if record.speed is None else whole(record.speed),
        f"{duration(record.silent(now))} ago",
        record.doing,
        duration(record.seconds),
        f"{record.pid} on {record.host}",
    ]
