"""The diagnosis of a run from the statuses of its ranks, and the text of the report: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moetrain.parallel.watchdog.rank_status import Place, RankStatus

_NAMED = 8  # ranks that a report lists one by one


@dataclass(frozen=True)
class Peer:
    """Another rank: its last status (None: it never sent one), and ``silent``, the seconds since then."""

    status: RankStatus | None
    silent: float


@dataclass(frozen=True)
class View:
    """One rank's knowledge of the run.

    rank         its number in the run.
    own          its own status.
    peers        every other rank.
    members      the ranks of the group that it waits in, in the group's order; empty if it waits in none.
    unreachable  seconds since the store last answered.
    sure         seconds after which a beat is overdue.
    refused      seconds since the store's address refuses connections; 0 if its process ended without error.
    """

    rank: int
    own: RankStatus
    peers: Mapping[int, Peer]
    members: Sequence[int]
    unreachable: float
    sure: float
    refused: float = 0.0


def diagnose(view: View, timeout: float) -> str | None:
    """The reason why the run must end, as a phrase; None if it may go on. ``timeout`` is in seconds."""
    place, seconds = view.own.place, view.own.seconds
    if place is not None:
        if (apart := out_of_step(view)) is not None:
            return apart
        if not place.patient and seconds > timeout:
            return f"waited {seconds:.1f} s (parallel.timeout={timeout:g})"
        silent = [r for r in view.members if r in view.peers and view.peers[r].silent > timeout]
        if seconds > timeout and silent:
            return f"{ranks(silent)} silent for longer than parallel.timeout={timeout:g} s"
    if view.refused > view.sure:
        return "the store is gone, and with it the launcher or the rank that held it"
    if view.unreachable > timeout:
        return f"the store has not answered for {view.unreachable:.1f} s (parallel.timeout={timeout:g})"
    return None


def out_of_step(view: View) -> str | None:
    """Two ranks whose collectives cannot belong together, as a phrase that names both.

    The collectives of a group are matched by their order: the n-th of each rank must be the same, with the
    rows that one rank sends equal to those that the other expects. Two ranks that wait for each other in two
    groups are deadlocked as well.
    """
    place, own = view.own.place, view.own
    if place is None or place.patient:
        return None
    me = list(view.members).index(view.rank)
    for index, rank in enumerate(view.members):
        status = view.peers[rank].status if rank in view.peers else None
        other = None if status is None else status.place
        if status is None or other is None or other.patient:
            continue
        here, there = f"{own.phase}, {place.title}", f"{status.phase}, {other.title}"
        both = f"rank {view.rank} is in {here}, rank {rank} in {there}"
        if (other.group, other.number) == (place.group, place.number):
            if here != there:
                return f"out of step: {both}"
            if place.received and other.sent and place.received[index] != other.sent[me]:
                return (
                    f"splits differ: rank {view.rank} expects {place.received[index]} rows of rank {rank}, "
                    f"which sends {other.sent[me]}"
                )
        elif (
            not status.has_entered(place)
            and not own.has_entered(other)
            and other.group in own.counts  # so it waits for this rank as well
            and min(own.seconds, status.seconds) > view.sure
        ):
            return f"out of step: {both}"
    return None


def report(view: View, why: str) -> list[str]:
    """The lines of the report: this rank's place and ``why`` it ends, its splits, and the missing ranks."""
    own, place = view.own, view.own.place
    if place is None:
        return [f"{why}; here: {own}", *_others(view, sorted(view.peers))]
    lines = [f"{own.phase}, {place.title}: {why}"]
    if (splits := _splits(place, view.members)) is not None:
        lines.append(splits)
    return lines + _missing(view, place)


def _splits(place: Place, members: Sequence[int]) -> str | None:
    of, size = f"splits by rank {_list(members)}", f"rows of {place.row_bytes} bytes"
    if place.sent or place.received:
        return f"{of}: sends {_list(place.sent)} {size}, expects {_list(place.received)}"
    return f"{of}: sends and expects equally many {size}" if place.row_bytes else None


def _missing(view: View, place: Place) -> list[str]:
    """Those of the group that are not known to have come, and any rank of the run that has fallen silent."""
    peers = view.peers
    absent = [rank for rank in view.members if rank in peers and not _arrived(peers[rank], view.own, place)]
    silent = [rank for rank in sorted(peers) if rank not in absent and _silent(peers[rank], view)]
    return _others(view, absent + silent) or ["all ranks have arrived"]


def _arrived(peer: Peer, own: RankStatus, place: Place) -> bool:
    status = peer.status
    if status is None or not status.has_entered(place):
        return False
    other = status.place
    if other is None or (other.group, other.number) != (place.group, place.number):
        return True
    return (status.phase, other.title) == (own.phase, place.title)


def _silent(peer: Peer, view: View) -> bool:
    return peer.silent > view.sure and not (peer.status and peer.status.ended)


def _others(view: View, chosen: Sequence[int]) -> list[str]:
    lines = []
    for rank in chosen[:_NAMED]:
        peer = view.peers[rank]
        waited_for = "" if view.own.place is None else "not arrived, "
        state = "lost (killed, stopped or cut off), " if _silent(peer, view) else waited_for
        if peer.status is None:
            lines.append(f"rank {rank}: {state}never heard of")
            continue
        lines.append(f"rank {rank}: {state}last heard of {peer.silent:.1f} s ago: {peer.status}")
    if more := chosen[_NAMED:]:
        lines.append(f"and {ranks(more)}")
    return lines


def ranks(numbers: Sequence[int]) -> str:
    """``rank 3``, ``ranks 1, 3``."""
    return f"rank{'s' if len(numbers) > 1 else ''} {_list(numbers)}"


def _list(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(n) for n in numbers[:_NAMED])
    return f"{shown}, ... ({len(numbers)})" if len(numbers) > _NAMED else shown
