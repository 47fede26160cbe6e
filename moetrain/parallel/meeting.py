"""The meeting of one start's ranks in a store in which an earlier start may have left keys.

torchrun restarts ranks on the same store, and addresses of dead ranks are among the keys. Its count of
restarts does not identify a start: after a node has failed the counts of the nodes differ, and when one
has joined no count changes.
"""

from __future__ import annotations

import secrets
import time

from torch.distributed.distributed_c10d import Store

_POLL = (0.02, 0.5)  # seconds between two looks at the store, at first and at most
_NAMED = 8  # ranks that a message lists


def meet(store: Store, rank: int, world: int, seconds: float) -> str:
    """The prefix of this start's keys, the same on all its ranks; returns when all ranks have joined.

    Each process has a random token. Rank 0 makes a prefix for the tokens that it finds and writes it under
    each of them, again if one changes, until every rank has answered under that prefix. Raises
    TimeoutError, which names the ranks that have not joined within ``seconds``.
    """
    token = secrets.token_hex(8)
    store.set(_here(rank), token)
    step = _Host(store, world) if rank == 0 else _Guest(store, rank, token)
    deadline, pause = time.monotonic() + seconds, _POLL[0]
    while (prefix := step.look()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(_missing(store, world))
        time.sleep(pause)
        pause = min(2 * pause, _POLL[1])
    return prefix


class _Host:
    """The side of rank 0."""

    def __init__(self, store: Store, world: int) -> None:
        self._store, self._ranks = store, range(world)
        self._invited: list[bytes] = []
        self._prefix = ""

    def look(self) -> str | None:
        places = [_here(rank) for rank in self._ranks]
        if not self._store.check(places):
            return None
        tokens = self._store.multi_get(places)
        if tokens != self._invited:
            self._invited, self._prefix = tokens, f"start/{secrets.token_hex(8)}"
            for guest in tokens:
                self._store.set(_invitation(guest.decode()), self._prefix)
        if not self._store.check([_answer(self._prefix, rank) for rank in self._ranks[1:]]):
            return None
        self._store.set(_all_there(self._prefix), "1")
        return self._prefix


class _Guest:
    """The side of any other rank."""

    def __init__(self, store: Store, rank: int, token: str) -> None:
        self._store, self._rank, self._token = store, rank, token

    def look(self) -> str | None:
        if not self._store.check([_invitation(self._token)]):
            return None
        prefix = self._store.get(_invitation(self._token)).decode()
        self._store.set(_answer(prefix, self._rank), "1")
        return prefix if self._store.check([_all_there(prefix)]) else None


def _missing(store: Store, world: int) -> str:
    absent = [str(rank) for rank in range(world) if not store.check([_here(rank)])]
    shown = ", ".join(absent[:_NAMED]) + (f", ... ({len(absent)})" if len(absent) > _NAMED else "")
    return f"rank(s) {shown} did not come" if absent else "not all ranks of this start came"


def _here(rank: int) -> str:
    return f"here/{rank}"


def _invitation(token: str) -> str:
    return f"invited/{token}"


def _answer(prefix: str, rank: int) -> str:
    return f"{prefix}/answer/{rank}"


def _all_there(prefix: str) -> str:
    return f"{prefix}/all"
