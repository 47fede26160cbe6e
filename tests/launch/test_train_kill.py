"""Real processes that are killed with SIGKILL and started again by the same command.

``benchmarks/kill_resume.py`` does the killing and the comparing; it also runs by hand.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.real
BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


def kill_and_resume(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("kill_resume")
    monkeypatch.delitem(sys.modules, "timing", raising=False)
    result: dict[str, Any] = module.kill_and_resume(folder, **options)
    return result


def assert_equal(result: dict[str, Any]) -> None:
    assert result["rows_equal"], result
    assert result["weights_equal"], result
    assert result["rows"] == result["steps"] + (result["steps"] + 9) // 10
    killed = [life for life in result["lives"] if life["moment"] != "while starting"]
    assert all(life["exit_code"] != 0 for life in result["lives"]), result
    assert all(0 < life["rows"] < result["steps"] for life in killed), result


def test_a_kill_while_a_checkpoint_is_being_written(tmp_path, monkeypatch):
    """The moment with the most to lose; the others are among the twenty kills below."""
    result = kill_and_resume(
        tmp_path, monkeypatch, kills=1, ranks=1, steps=12, seed=5, moments=("while saving",)
    )
    assert_equal(result)
    assert result["killed"] == {"while saving": 1}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_kills(ranks, tmp_path, monkeypatch):
    result = kill_and_resume(tmp_path, monkeypatch, kills=20, ranks=ranks, steps=80, seed=0)
    assert_equal(result)
    assert result["half_written_checkpoints"] > 0
