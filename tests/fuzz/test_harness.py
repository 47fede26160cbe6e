"""The fuzzer finds what it is for: faults of every kind that are planted, by mutations of every form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz.planted import FAULTS, NAIVE, make_small_world
from fuzz.runner import Runner
from fuzz.verdict import Limits

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
    (verdict,) = runner.run([(fault.replace(" ", "_"), 0)])
    assert verdict.kind == fault.split()[0], verdict.line()


@pytest.mark.parametrize("form", list(NAIVE))
def test_mutations_of_each_form_find_faults(form: str, runner: Runner) -> None:
    verdicts = list(runner.run((f"naive_{form}", seed) for seed in range(80)))
    found = {verdict.place.split()[-1] for verdict in verdicts if verdict.kind == "other"}
    assert found >= _EXPECTED[form]
    again = list(runner.run((f"naive_{form}", seed) for seed in range(5)))
    assert [(v.kind, v.note) for v in again] == [(v.kind, v.note) for v in verdicts[:5]]
