"""``train.eval_first``: the held-out loss of the weights that a run begins with."""

from __future__ import annotations

import shutil

import pytest
import tiny

from moetrain.report.commands import status_command
from moetrain.report.page import write_report
from moetrain.report.runs import read_run
from moetrain.train.log.jsonl import read_metrics
from moetrain.train.log.wandb_rows import LoggedRows

FEW = ["train.steps=4", "checkpoint.every=2", "checkpoint.keep_last=9", "train.eval_every=0"]
FIRST = [*FEW, "train.eval_first=true"]


@pytest.fixture(scope="module")
def begun(corpus, trained, tmp_path_factory):
    """A run from the weights of ``trained``, which was evaluated before its first step."""
    run = tmp_path_factory.mktemp("begun") / "run"
    with tiny.alone():
        assert tiny.train(corpus, run, *FIRST, f"init_from={trained}") == 0
    return run


def test_the_first_row_is_of_the_weights_it_begins_with(begun, trained):
    rows = read_metrics(begun)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 4]
    row = {key: value for key, value in rows[0].items() if key != "time"}
    assert row == tiny.evaluations(trained)[-1] | {"step": 0, "tokens": 0}


@pytest.mark.usefixtures("training")
def test_nothing_else_of_the_run_changes(begun, corpus, trained, tmp_path):
    assert tiny.train(corpus, tmp_path, *FEW, f"init_from={trained}") == 0
    assert tiny.steps(begun) == tiny.steps(tmp_path)
    assert tiny.evaluations(begun)[1:] == tiny.evaluations(tmp_path)
    for step in (2, 4):
        tiny.assert_same_state(tiny.checkpoint(begun, step), tiny.checkpoint(tmp_path, step))


@pytest.mark.usefixtures("training")
def test_a_resumed_run_does_not_evaluate_again(begun, corpus, trained, tmp_path, capsys):
    """Not where the row is lost, either: the weights of the start are gone."""
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    shutil.rmtree(tiny.checkpoint(run, 4))
    metrics = run / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[1:]))
    assert tiny.train(corpus, run, *FIRST, f"init_from={trained}") == 0
    assert "step 0/4" not in capsys.readouterr().out
    assert tiny.evaluations(run) == tiny.evaluations(begun)[1:]


@pytest.mark.usefixtures("training")
def test_a_run_that_begins_again_has_its_own_row(begun, corpus, tmp_path, capsys):
    """Killed before its first checkpoint, and begun anew with other weights: a fresh model's."""
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    shutil.rmtree(run / "checkpoints")
    assert tiny.train(corpus, run, *FIRST) == 0
    assert "step 0/4  val loss 5.5" in capsys.readouterr().out  # ln 257 = 5.55
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 4]
    assert rows[0]["val/loss"] > tiny.evaluations(begun)[0]["val/loss"] + 0.01


def test_reports_and_status_have_it(begun, tmp_path, capsys):
    loss = tiny.evaluations(begun)[0]["val/loss"]
    steps, losses = read_run(begun).series("val/loss")
    assert (steps.tolist(), losses[0]) == ([0, 4], loss)
    (tmp_path / "metrics.jsonl").write_text((begun / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    shutil.copy(begun / "config.yaml", tmp_path)
    assert status_command([str(tmp_path)]) == 0  # before the first step has ended
    assert f"0/4   -     {loss:.4f}" in capsys.readouterr().out
    assert f"{loss:.4f}" in write_report([tmp_path], tmp_path / "report.html").read_text()


def test_wandb_gets_the_row_once(tmp_path):
    def logged(step, lr):
        rows = LoggedRows(tmp_path, "one", {"optim": {"lr": lr}})
        rows.begin("two" if rows.diverge(0) else "one")
        new = rows.is_new({"step": step, "val/loss": 1.0}, step)
        rows.close()
        return rows.now.id, new

    assert logged(0, 1.0) == ("one", True)
    assert logged(0, 1.0) == ("one", False)  # begun again, by the same command
    assert logged(0, 2.0) == ("two", True)  # and by another
