"""Runs of four ranks, broken once and started again, by ``benchmarks/chaos.py``, which also runs by hand."""

from __future__ import annotations

import importlib
import sys
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


@pytest.mark.real
def test_two_faults(chaos, tmp_path):
    faults = [fault for words in SHORT for fault in chaos.possible(words)]
    assert_right(chaos.chaos(tmp_path, len(faults), 3, faults))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_faults(chaos, tmp_path):
    assert_right(chaos.chaos(tmp_path, 50, 0, chaos.possible(None)))
