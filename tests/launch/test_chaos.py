"""Runs of four ranks, broken once and started again, by ``benchmarks/chaos.py``, which also runs by hand."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
SHORT = ("full in a save", "flipped")  # the watchdog's tests and the launchers' kill, stop and cut


@pytest.fixture
def chaos(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("timing", "netns"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("chaos")


def assert_right(outcomes) -> None:
    assert [str(one) for one in outcomes if not one.right] == []
    assert all(one.starts > 1 for one in outcomes)


WAIT = """
import ctypes, time
libc, mutex, cond = ctypes.CDLL(None), (ctypes.c_char * 64)(), (ctypes.c_char * 64)()
libc.pthread_mutex_lock(mutex)
end, before = time.time() + 0.3, time.monotonic()
deadline = (ctypes.c_long * 2)(int(end), int(end % 1 * 1e9))
libc.pthread_cond_timedwait(cond, mutex, deadline)
print(time.time(), time.monotonic() - before)
"""


@pytest.mark.skipif(not (shutil.which("cc") and sys.platform == "linux"), reason="the clock is a C library")
def test_timed_waits_last_under_a_clock_that_is_set_back(tmp_path):
    """torch waits until a time of this clock, of which the kernel knows nothing."""
    source, library = Path(BENCHMARKS, "chaos_clock.c"), tmp_path / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    (tmp_path / "offset").write_bytes((-3600).to_bytes(8, sys.byteorder, signed=True))
    env = {**os.environ, "LD_PRELOAD": str(library), "CLOCK_FILE": str(tmp_path / "offset")}
    ran = subprocess.run([sys.executable, "-c", WAIT], env=env, capture_output=True, text=True, check=True)
    now, waited = map(float, ran.stdout.split())
    assert time.time() - now == pytest.approx(3600, abs=100)
    assert waited >= 0.29


@pytest.mark.real
def test_two_faults(chaos, tmp_path):
    faults = [fault for words in SHORT for fault in chaos.possible(words)]
    assert_right(chaos.chaos(tmp_path, len(faults), 3, faults))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_faults(chaos, tmp_path):
    assert_right(chaos.chaos(tmp_path, 50, 0, chaos.possible(None)))
