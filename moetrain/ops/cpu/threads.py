"""Pieces of work, such as experts, each on one thread of its own, instead of all threads on one piece.

Threads that share a product wait for each other after each of its operations, and for each other's memory. It
is done where the threads that are idle meanwhile, those of OpenMP, soon sleep: else they take the cores away.
"""

from __future__ import annotations

import heapq
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

from moetrain import openmp_waits

T = TypeVar("T")

_MIN_WORK = 2**21  # multiplications of a mean piece: below, handing pieces over costs more than it saves
_UNEVEN = 1.1  # how much longer than the mean the busiest thread may take


def for_each(work: Callable[[int], T], sizes: Sequence[int]) -> list[T]:
    """``work(i)`` for each of ``sizes``, the multiplications of each piece; pieces must not share results.

    Torch's number of threads take a piece each, largest first, where that keeps them all busy; else all take
    one piece after the other. Threads record no gradient. An error is raised when all threads have ended.
    """
    threads = torch.get_num_threads()
    if not _fits(sizes, threads):
        return [work(piece) for piece in range(len(sizes))]
    order = iter(sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True))
    results: dict[int, T] = {}

    def run() -> None:
        with torch.no_grad():
            for piece in order:  # gives each piece out once, whichever thread asks
                results[piece] = work(piece)

    others = [_pool(threads - 1).submit(run) for _ in range(threads - 1)]
    torch.set_num_threads(1)  # of this thread's own operations
    try:
        run()
    finally:
        torch.set_num_threads(threads)
        wait(others)
    for other in others:
        other.result()
    return [results[piece] for piece in range(len(sizes))]


def _fits(sizes: Sequence[int], threads: int) -> bool:
    """Whether the pieces are worth it and keep all threads busy to the end."""
    if threads == 1 or len(sizes) < threads or sum(sizes) < _MIN_WORK * len(sizes) or not _may_start():
        return False
    busy = [0] * threads
    for size in sorted(sizes, reverse=True):
        heapq.heapreplace(busy, busy[0] + size)
    return max(busy) * threads <= _UNEVEN * sum(sizes)


@cache
def _may_start() -> bool:
    """Whether OpenMP's threads leave the cores to ours; builds without it keep one number of threads."""
    return torch.backends.openmp.is_available() and openmp_waits.are_short()


def _alone() -> None:
    """This thread's operations take one thread."""
    torch.get_num_threads()  # when first asked, torch sets the number that was set last for any thread
    torch.set_num_threads(1)


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads whose own operations take one thread each."""
    started = threading.Barrier(workers + 1)
    pool = ThreadPoolExecutor(workers, "experts", _alone)
    before = torch.get_num_threads()
    for _ in range(workers):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(before)  # which is also what threads that start later take
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads stay with the parent
