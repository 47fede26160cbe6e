"""Pieces of work on threads: each once, its result in its place, on one thread; errors are raised."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from moetrain import openmp_waits
from moetrain.ops.cpu import threads
from moetrain.ops.cpu.threads import for_each

LARGE = threads._MIN_WORK


@pytest.fixture(autouse=True)
def may_start(monkeypatch):
    """Whatever the environment says of OpenMP's threads."""
    monkeypatch.setattr(threads, "_may_start", lambda: True)


@pytest.fixture(params=[2, 3])
def number(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def who_does(sizes):
    return for_each(lambda piece: (piece, threading.current_thread().name, torch.get_num_threads()), sizes)


def test_each_piece_once_in_order_on_one_thread(number):
    together = threading.Barrier(number)  # broken after its time-out, if one thread did all

    def work(piece):
        if piece < number:  # the largest, which are handed out first
            together.wait(30)
        assert not torch.is_grad_enabled()
        return piece, threading.current_thread().name, torch.get_num_threads()

    sizes = [LARGE + 1] * number + [LARGE] * (2 * number)
    found = for_each(work, sizes)
    assert [piece for piece, _, _ in found] == list(range(len(sizes)))
    assert len({name for _, name, _ in found}) == number
    assert {one for _, _, one in found} == {1}
    assert torch.get_num_threads() == number
    assert torch.is_grad_enabled()


def test_a_new_thread_takes_one_thread_whatever_torchs_number(number):
    """Torch gives a thread, when first asked, the number that was set last for any thread."""
    threads._pool.cache_clear()
    pool = threads._pool(number - 1)
    assert torch.get_num_threads() == number
    together = threading.Barrier(number - 1)
    asked = [pool.submit(lambda: (together.wait(30), torch.get_num_threads())) for _ in range(number - 1)]
    assert {one.result()[1] for one in asked} == {1}


@pytest.mark.parametrize("sizes", [
    [LARGE], [LARGE // 2] * 12, [LARGE, LARGE * 100, LARGE], [], [0] * 7,
], ids=["one piece", "little work", "one piece has most", "none", "another device's"])  # fmt: skip
def test_what_would_not_keep_threads_busy_takes_all_of_them(number, sizes):
    name = threading.current_thread().name
    assert who_does(sizes) == [(piece, name, number) for piece in range(len(sizes))]


def test_nothing_is_started_beside_threads_that_spin(number, monkeypatch):
    monkeypatch.setattr(threads, "_may_start", lambda: False)
    assert [one for _, _, one in who_does([LARGE] * 12)] == [number] * 12


@pytest.mark.parametrize(("environ", "short"), [
    ({}, False), ({"GOMP_SPINCOUNT": "30000"}, True), ({"GOMP_SPINCOUNT": "300000"}, False),
    ({"GOMP_SPINCOUNT": "infinite"}, False), ({"OMP_WAIT_POLICY": "PASSIVE"}, True),
    ({"OMP_WAIT_POLICY": "active"}, False), ({"KMP_BLOCKTIME": "1"}, True), ({"KMP_BLOCKTIME": "200"}, False),
])  # fmt: skip
def test_what_the_environment_says_of_waiting(environ, short):
    assert openmp_waits.are_short(environ) is short


def test_one_thread_starts_no_other(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(threads, "_pool", None)
    assert for_each(lambda piece: piece, [LARGE] * 4) == [0, 1, 2, 3]


def test_an_error_is_raised_after_all_have_ended(number):
    ended = []

    def work(piece):
        if piece == 1:
            raise ValueError("of piece 1")
        ended.append(piece)

    with pytest.raises(ValueError, match="of piece 1"):
        for_each(work, [LARGE] * 12)
    assert sorted(ended) == [0, *range(2, 12)]
    assert torch.get_num_threads() == number
    assert [piece for piece, _, _ in who_does([LARGE] * 12)] == list(range(12))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system forks no processes")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(number):
    who_does([LARGE] * 12)
    child = os.fork()
    if child == 0:
        threading.Timer(30, os._exit, [2]).start()
        os._exit(0 if threads._pool.cache_info().currsize == 0 and threads._pool(1) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
