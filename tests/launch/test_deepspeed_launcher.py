"""DeepSpeed's own launcher: a run by it, native steps from the same folder, and by it again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import tiny
from ports import free_port

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]
LAUNCH = Path(__file__).parents[2] / "launch" / "deepspeed"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.mark.parametrize(("first", "last"), [(2, 1), (3, 3)])
def test_deepspeed_then_native_then_deepspeed_in_one_folder(first, last, corpus, trained, tmp_path):
    """Twelve steps, of which the native engine makes the middle ones."""
    run = tmp_path / "run"

    def command(steps, *overrides):
        rest = [a for a in tiny.TRAINED if "train.steps" not in a]
        return tiny.command(corpus, run, *rest, f"train.steps={steps}", *overrides)[1:]

    def deepspeed(log, steps, *overrides):
        script = [str(LAUNCH / "train.sh"), *command(steps, *overrides)]
        with tiny.Process(script, tmp_path / log, NPROC="2", PATH=PATH) as process:
            assert process.wait(240) == 0, process.output()
        return process.output()

    said = deepspeed("first.log", 4, f"engine.zero_stage={first}")
    assert "2 process(es)" in said
    assert "Traceback" not in said
    native = [sys.executable, "-m", "moetrain", "train", *command(8)]
    with tiny.Process(native, tmp_path / "second.log") as process:
        assert process.wait(240) == 0, process.output()
    assert "step_00000004: 4 steps done" in process.output()
    assert "step_00000008: 8 steps done" in deepspeed("third.log", tiny.STEPS, f"engine.zero_stage={last}")
    rows, there = tiny.steps(run), tiny.steps(trained)
    assert [row["step"] for row in rows] == list(range(1, tiny.STEPS + 1))
    assert all(abs(a["train/loss"] - b["train/loss"]) < 1e-5 for a, b in zip(rows, there, strict=True))


def test_two_nodes_without_ssh(corpus, trained, tmp_path):
    """Two launchers on one machine, each of a node of one process by the hostfile."""
    run, hostfile = tmp_path / "run", tmp_path / "hostfile"
    hostfile.write_text("# name and processes\nlocalhost slots=1\nsecond slots=1\n")
    arguments = [str(LAUNCH / "nodes.sh"), *tiny.command(corpus, run, *tiny.TRAINED)[1:]]
    environment = {"HOSTFILE": str(hostfile), "PORT": str(free_port()), "PATH": PATH}
    with (
        tiny.Process(arguments, tmp_path / "0.log", NODE_RANK="0", **environment) as first,
        tiny.Process(arguments, tmp_path / "1.log", NODE_RANK="1", **environment) as second,
    ):
        assert first.wait(240) == 0, first.output() + second.output()
        assert second.wait(60) == 0, second.output()
    assert "2 process(es)" in first.output()
    rows, there = tiny.steps(run), tiny.steps(trained)
    assert all(abs(a["train/loss"] - b["train/loss"]) < 1e-5 for a, b in zip(rows, there, strict=True))
