"""Training as a user starts it: in a terminal that presses Ctrl-C twice, and under torchrun."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import tiny

pytestmark = pytest.mark.real
LAUNCH = Path(__file__).parents[2] / "launch"


def test_a_second_ctrl_c_leaves_at_once(corpus, tmp_path):
    """The first arrives in the middle of a step that takes a minute: only a second one can end it."""
    run = tmp_path / "run"
    slow = ["plugins=[faulty_router]", "router=faulty", "router.samples=[9]", "router.fault=sleep"]
    with tiny.started(corpus, run, *slow, "checkpoint.every=1") as process:
        process.until(lambda: tiny.checkpoints(run) == [1, 2])
        process.popen.send_signal(signal.SIGINT)
        process.until(lambda: "stopping after this step and saving" in process.output())
        process.popen.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert process.output().endswith("SIGINT again: leaving at once, nothing more is saved\n")
    assert tiny.checkpoints(run) == [1, 2]


def test_sigterm_is_a_code_to_start_it_again_by(corpus, trained, tmp_path):
    """What the script of a batch system sees: 75, the same command, 0."""
    run = tmp_path / "run"
    fault = ["plugins=[faulty_router]", "router=faulty", f"router.signal={int(signal.SIGTERM)}"]
    options = [*tiny.TRAINED, *fault, "router.at_step=6"]
    with tiny.started(corpus, run, *options) as process:
        assert process.wait() == 75, process.output()
    assert tiny.checkpoints(run) == [5, 7]
    assert "stopped after step 7 (SIGTERM); saved" in process.output()
    with tiny.started(corpus, run, *options) as process:
        assert process.wait() == 0, process.output()
    assert tiny.steps(run) == tiny.steps(trained)
    tiny.assert_same_state(tiny.checkpoint(run, tiny.STEPS), tiny.checkpoint(trained, tiny.STEPS))


@pytest.mark.parametrize(("restarts", "code"), [(0, 1), (1, 0)])
def test_torchrun_has_one_code_for_every_failure(restarts, code, corpus, tmp_path):
    """The summary tells a stop from a failure; a stop is none where torchrun would begin again."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "STOP").touch()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, f"--max-restarts={restarts}", "-m", "moetrain"]
    with tiny.Process([*command, *tiny.command(corpus, run, *tiny.TRAINED)], tmp_path / "log") as process:
        assert process.wait() == code, process.output()
    assert tiny.checkpoints(run) == [1]
    assert tiny.summary(run)["finished"] is False
    assert ("exitcode  : 75" in process.output()) is (code == 1)
    assert process.output().count("stopped after step 1 ") == (1 if code == 0 else 3)


def test_ctrl_c_before_the_first_step_ends_it(corpus, tmp_path):
    """While the text is being read there is nothing to save yet."""
    run = tmp_path / "run"
    with tiny.started(corpus, run, "plugins=[slow_reading]") as process:
        process.until(lambda: (run / "checkpoints").exists())
        process.popen.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert tiny.files(run) == []
    assert "Traceback" not in process.output()


def test_torchrun_a_killed_rank_and_the_same_command_again(corpus, trained, tmp_path):
    """The launch script, two ranks, one of them killed in the eighth step; then again without the fault."""
    run = tmp_path / "run"
    run.mkdir()
    script = [str(LAUNCH / "torchrun" / "train.sh"), *tiny.command(corpus, run, *tiny.TRAINED)[1:]]
    script += ["plugins=[faulty_router]", "router=faulty", "resume_changes=[router]"]
    fault = [f"router.signal={int(signal.SIGKILL)}", "router.at_step=7", "router.rank=1"]
    environment = {"NPROC": "2", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with tiny.Process([*script, *fault], tmp_path / "first.log", **environment) as process:
        assert process.wait() == 1, process.output()
    assert tiny.checkpoints(run) == [5]
    assert not (run / "summary.json").exists()
    with tiny.Process(script, tmp_path / "second.log", **environment) as process:
        assert process.wait() == 0, process.output()
    assert "2 process(es)" in process.output()
    assert "step_00000005: 5 steps done" in process.output()
    rows, there = tiny.steps(run), tiny.steps(trained)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(abs(a["train/loss"] - b["train/loss"]) < 1e-4 for a, b in zip(rows, there, strict=True))
