"""Whatever is in a file, reading it gives an error line or the right values, in bounded time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz.catalogue import KNOWN, TARGETS
from fuzz.runner import Runner
from fuzz.table import jobs, table
from fuzz.world import make_world

SHORT, MORE = 12, 40  # mutations of a target in make test, and with those of make test-real
COSTLY = {"report_plots": 1, "run_config": 8, "run_tokenizer": 5, "overrides": 5, "hf_index": 5}  # fewer
LONG = 10_000  # these begin at another seed


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    world: Path = tmp_path_factory.mktemp("fuzz") / "world"
    make_world(world)
    with Runner(world) as running:
        yield running


@pytest.mark.parametrize("target", list(TARGETS))
def test_mutated_files_are_read_right_or_refused(target: str, runner: Runner) -> None:
    assert_read_right(runner, target, range(COSTLY.get(target, SHORT)))


@pytest.mark.real
@pytest.mark.parametrize("target", list(TARGETS))
def test_more_mutated_files_are_read_right_or_refused(target: str, runner: Runner) -> None:
    first = COSTLY.get(target, SHORT)
    assert_read_right(runner, target, range(first, first * MORE // SHORT))


def assert_read_right(runner: Runner, target: str, seeds: range) -> None:
    outcomes = list(runner.run((target, seed) for seed in seeds))
    wrong = [outcome.line() for outcome in outcomes if not outcome.good]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("document", list(KNOWN))
def test_a_document_that_was_read_wrong_once(document: str, runner: Runner) -> None:
    (outcome,) = runner.run([(document, 0)])
    assert outcome.good, outcome.line()


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_ten_thousand_mutations(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = list(runner.run(jobs(LONG, start=1000)))
    with capsys.disabled():
        print(f"\n{table(outcomes)}")
    assert not [outcome.line() for outcome in outcomes if not outcome.good]
