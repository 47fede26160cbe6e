"""Stopping a run between two steps: what is said and saved, and that it goes on bit for bit.

The signals are sent to this process by a router, in the middle of a step. A second signal, torchrun and
killed ranks are in tests/launch.
"""

from __future__ import annotations

import signal

import pytest
import tiny

from moetrain.cli import main
from moetrain.errors import STOPPED
from moetrain.parallel.environment import stopped


@pytest.mark.parametrize(
    ("number", "at_step", "override"),
    [
        (signal.SIGTERM, 2, "checkpoint.every=5"),
        (signal.SIGINT, 4, "checkpoint.every=5"),  # where an evaluation and a checkpoint are due
        (signal.SIGTERM, 6, "checkpoint.every=0"),
        (signal.SIGINT, 7, "checkpoint.async_save=true"),
    ],
)
def test_a_signal_stops_and_the_same_command_goes_on(
    number, at_step, override, faulty, corpus, trained, tmp_path, capfd
):
    run = tmp_path / "run"
    options = [*tiny.TRAINED, *faulty, f"router.signal={number}", f"router.at_step={at_step}", override]
    assert tiny.train(corpus, run, *options) == STOPPED
    said = capfd.readouterr()
    stopped = (
        f"stopped after step {at_step + 1} ({number.name}); saved {run}/checkpoints; the same command goes on"
    )
    assert stopped in said.out
    assert f"{number.name}: stopping after this step and saving" in said.err
    assert tiny.checkpoints(run)[-1] == at_step + 1
    assert len(tiny.steps(run)) == at_step + 1
    summary = tiny.summary(run)
    assert (summary["finished"], summary["reason"], summary["steps"]) == (False, number.name, at_step + 1)
    assert not (run / "report.html").exists()
    assert main(["status", str(run)]) == 0
    assert f"stopped: {number.name}" in capfd.readouterr().out

    assert tiny.train(corpus, run, *options) == 0
    assert f"{at_step + 1} steps done" in capfd.readouterr().out
    assert tiny.steps(run) == tiny.steps(trained)
    assert tiny.evaluations(run) == tiny.evaluations(trained)
    tiny.assert_same_state(tiny.checkpoint(run, tiny.STEPS), tiny.checkpoint(trained, tiny.STEPS))
    assert tiny.summary(run)["finished"] is True


def test_the_stop_file_is_obeyed_once(training, corpus, trained, tmp_path, capsys):
    run = tmp_path / "run"
    for done in (1, 2):
        run.mkdir(exist_ok=True)
        (run / "STOP").touch()
        assert tiny.train(corpus, run, *tiny.TRAINED) == STOPPED
        assert f"stopped after step {done} ({run}/STOP exists)" in capsys.readouterr().out
        assert not (run / "STOP").exists()
        assert tiny.checkpoints(run)[-1] == done
    assert tiny.train(corpus, run, *tiny.TRAINED) == 0
    assert tiny.steps(run) == tiny.steps(trained)
    tiny.assert_same_state(tiny.checkpoint(run, tiny.STEPS), tiny.checkpoint(trained, tiny.STEPS))


def test_a_signal_in_the_last_step_changes_nothing(faulty, corpus, trained, tmp_path):
    run = tmp_path / "run"
    options = [
        *tiny.TRAINED,
        *faulty,
        f"router.signal={int(signal.SIGTERM)}",
        f"router.at_step={tiny.STEPS - 1}",
    ]
    assert tiny.train(corpus, run, *options) == 0
    assert tiny.summary(run)["finished"] is True
    assert tiny.evaluations(run) == tiny.evaluations(trained)


def test_a_run_without_a_name_is_told_where_it_lies(faulty, corpus, tmp_path, capsys):
    """The same command would begin another run, in a folder of its own."""
    options = [*faulty, f"router.signal={int(signal.SIGTERM)}", "router.at_step=1"]
    arguments = [o for o in tiny.command(corpus, tmp_path, *options) if not o.startswith("run.dir=")]
    assert main([*arguments, f"run.root={tmp_path}/runs"]) == STOPPED
    (run,) = (tmp_path / "runs").iterdir()
    assert f"the same command with run.dir={run} goes on from there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("most", "done", "code"),
    [(None, None, 75), ("0", "0", 75), ("3", "1", 0), ("3", "3", 75), ("many", "0", 75)],
)
def test_torchrun_with_restarts_left_is_told_nothing(most, done, code, monkeypatch):
    """It would begin the run again, which was asked to stop."""
    for name, value in (("MAX_RESTARTS", most), ("RESTART_COUNT", done)):
        monkeypatch.delenv(f"TORCHELASTIC_{name}", raising=False)
        if value is not None:
            monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    assert stopped() == code


@pytest.mark.real  # as the sweep's; each run of a comparison answers as a run of its own
def test_a_comparison_that_is_asked_to_stop_begins_no_other_run(faulty, corpus, tmp_path, capsys):
    asked = [*faulty, f"router.signal={int(signal.SIGTERM)}", "router.at_step=1", "train.steps=4"]
    arms = ["compare.arms={one: ['optim.lr=0.001'], two: ['optim.lr=0.002']}", "compare.seeds=[3]"]
    assert tiny.train(corpus, tmp_path, *asked, *arms) == STOPPED
    assert f"comparison stopped in {tmp_path}/one/seed_3; the same command" in capsys.readouterr().out
    assert not (tmp_path / "two").exists()
