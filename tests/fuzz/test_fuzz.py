"""Whatever is in a file, reading it gives an error line or the right values, in bounded time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz.catalogue import KNOWN, TARGETS
from fuzz.runner import Runner
from fuzz.table import jobs, table
from fuzz.world import make_world

SHORT = 20  # mutations of a target in every run of the tests; those of a long run begin at another seed
COSTLY = {"report_plots": 2, "run_config": 12, "run_tokenizer": 8, "overrides": 8, "hf_index": 8}  # fewer
LONG = 10_000


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    world: Path = tmp_path_factory.mktemp("fuzz") / "world"
    make_world(world)
    with Runner(world) as running:
        yield running


@pytest.mark.parametrize("target", list(TARGETS))
def test_mutated_files_are_read_right_or_refused(target: str, runner: Runner) -> None:
    outcomes = list(runner.run((target, seed) for seed in range(COSTLY.get(target, SHORT))))
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
