"""The fuzzer finds what it is for: faults of every kind that are planted, by mutations of every form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz.outcome import Limits
from fuzz.planted import FAULTS, NAIVE, make_small_world
from fuzz.runner import Runner

_EXPECTED = {  # exceptions that each form's mutations bring about in a loader that checks nothing
    "json": {"KeyError", "TypeError", "RecursionError", "JSONDecodeError"},
    "yaml": {"KeyError", "TypeError", "ScannerError"},
    "jsonl": {"KeyError", "TypeError", "JSONDecodeError"},
    "safetensors": {"KeyError", "TypeError", "JSONDecodeError", "error"},
    "bytes": {"ValueError"},
    "gguf": {"error", "KeyError"},
}


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    world: Path = tmp_path_factory.mktemp("harness") / "world"
    make_small_world(world)
    with Runner(world, Limits(seconds=0.3, wall=5.0, memory=2e8, grace=0.5)) as running:
        yield running


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_planted_fault_is_found(fault: str, runner: Runner) -> None:
    (outcome,) = runner.run([(fault.replace(" ", "_"), 0)])
    assert outcome.kind == fault.split()[0], outcome.line()


@pytest.mark.parametrize("form", list(NAIVE))
def test_mutations_of_each_form_find_faults(form: str, runner: Runner) -> None:
    outcomes = list(runner.run((f"naive_{form}", seed) for seed in range(80)))
    found = {outcome.place.split()[-1] for outcome in outcomes if outcome.kind == "other"}
    assert found >= _EXPECTED[form]
    again = list(runner.run((f"naive_{form}", seed) for seed in range(5)))
    assert [(one.kind, one.note) for one in again] == [(one.kind, one.note) for one in outcomes[:5]]
