"""A run on four ranks of two torchruns, one of which is lost and comes back: 4 -> 2 -> 4."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest
import tiny
from ports import free_port

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]
SCRIPT = str(Path(__file__).parents[2] / "launch" / "torchrun" / "nodes.sh")
STEPS = 60
OPTIONS = [
    f"train.steps={STEPS}", "train.eval_every=0", "checkpoint.every=4", "train.precision=fp64",
    "model.num_experts=12", "parallel.ep=4", "parallel.elastic=true", "parallel.timeout=30",
    "balance=aux_free", "router.capacity_factor=1.2", "router.jitter=0.1",
    "data.cross_document_attention=true", "plugins=[faulty_router]", "router=faulty",
]  # fmt: skip
RESTS = "router.pace=0.3"  # seconds a micro-batch, so that there is something left when a torchrun comes back
SLACK = 200  # seconds, on a busy machine


def agent(corpus: Path, run: Path, port: int, log: Path) -> tiny.Process:
    """The launch script with two ranks, of one node or two, hasty for the test."""
    environment = {"NNODES": "1:2", "NPROC": "2", "HEAD": f"127.0.0.1:{port}", "MAX_RESTARTS": "9"}
    environment |= {
        "PET_LOCAL_ADDR": "127.0.0.1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    environment["PET_RDZV_CONF"] = "last_call_timeout=8,keep_alive_interval=1,keep_alive_max_attempt=4"
    return tiny.Process([SCRIPT, *tiny.command(corpus, run, *OPTIONS, RESTS)[1:]], log, **environment)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def worlds(run: Path) -> list[int]:
    """The numbers of ranks of all starts so far."""
    try:
        found = json.loads((run / "environment.json").read_text())
    except FileNotFoundError:
        return []
    return [start["world_size"] for start in [*found["earlier"], found]]


def test_a_torchrun_is_lost_and_another_one_comes(corpus, tmp_path):
    whole, run, port = tmp_path / "whole", tmp_path / "run", free_port()
    with tiny.alone():
        assert tiny.train(corpus, whole, *OPTIONS) == 0
    with agent(corpus, run, port, tmp_path / "first.log") as first:
        first.until(lambda: answers(port), SLACK)  # whoever is first holds the store in which they meet
        with agent(corpus, run, port, tmp_path / "lost.log") as lost:
            first.until(lambda: worlds(run)[-1:] == [4] and tiny.rows_written(run) > 6, SLACK)
            lost.kill_all()
        first.until(lambda: worlds(run)[-1:] == [2] and bool(tiny.checkpoints(run)), SLACK)
        with agent(corpus, run, port, tmp_path / "again.log") as again:
            assert first.wait(SLACK) == 0, first.output()
            assert again.wait(SLACK) == 0, again.output()
    assert worlds(run)[-3:] == [4, 2, 4], first.output()
    assert "parallel.ep=2 on 2 rank(s), where 4 was asked for" in first.output()
    rows, there = tiny.steps(run), tiny.steps(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    worst = max(abs(a["train/loss"] - b["train/loss"]) for a, b in zip(rows, there, strict=True))
    print(f"worlds {worlds(run)}, largest difference of a loss {worst:.1e}")
    assert worst < 1e-9
    mine, theirs = (tiny.contents(tiny.checkpoint(r, STEPS))[0] for r in (run, whole))
    assert mine.keys() == theirs.keys()
    assert max(float((mine[n].double() - t.double()).abs().max()) for n, t in theirs.items()) < 1e-9
