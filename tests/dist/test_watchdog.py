"""No rank waits for ever: one killed, stopped, asleep, cut off or out of step; the others end and say so."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import netns
import pytest
import tiny
import torch
import torch.distributed as dist
from lives import Lives

from moetrain.moe.dispatch.collectives import Calls, Exchange, OutOfStepError
from moetrain.parallel.ranks import run_ranks
from moetrain.parallel.watchdog.flight_recorder import patiently, watched
from moetrain.parallel.watchdog.watchdog import watching
from moetrain.train.run_lock import FolderLock

pytestmark = pytest.mark.real

TIMEOUT = 3
SLACK = 40  # seconds from a rank's loss to the others' end, on a busy machine
EP = ["parallel.ep=2", "model.num_experts=6", "train.micro_batch_size=1", f"parallel.timeout={TIMEOUT}"]
FAULTY = ["plugins=[faulty_router]", "router=faulty", "router.rank=1", "router.at_step=3"]
TESTS = str(Path(tiny.__file__).parent)


def live(corpus: Path, folder: Path, *overrides: str, **environment: str) -> Lives:
    """The tiny run on two ranks that share each layer's experts."""
    command = tiny.command(corpus, folder / "run", "train.steps=12", *EP, *overrides)
    return Lives([command] * 2, folder, PYTHONPATH=TESTS, **environment)


def report(lives: Lives, rank: int) -> str:
    """What a rank printed of its end: whole lines, each with its number."""
    said = lives.output(rank)
    assert "Traceback" not in said
    return "\n".join(line for line in said.splitlines() if line.startswith(f"moetrain: error: rank {rank}: "))


def test_a_rank_is_killed_in_a_layer(corpus, tmp_path):
    with live(
        corpus, tmp_path, *FAULTY, f"router.signal={int(signal.SIGKILL)}", "router.at_layer=1"
    ) as lives:
        assert lives.codes(SLACK) == [1, -signal.SIGKILL]
        said = report(lives, 0)
    assert said.startswith(
        "moetrain: error: rank 0: step 4, blocks.1.feed_forward, counts (all_to_all, forward):"
    )
    assert "onnection" in said.splitlines()[0], said  # what gloo said, in one line
    assert "splits by rank 0, 1: sends and expects equally many rows of 32 bytes" in said
    assert "rank 1: lost (killed, stopped or cut off), last heard of" in said


@pytest.mark.parametrize(
    "fault",
    [f"router.signal={int(signal.SIGSTOP)}", pytest.param("router.hold=true", marks=pytest.mark.slow)],
)
def test_a_rank_is_stopped_or_keeps_its_threads_from_running(fault, corpus, tmp_path):
    with live(corpus, tmp_path, *FAULTY, fault, "router.sleep=1000") as lives:
        assert lives.code(0, SLACK) == 1
        said = report(lives, 0)
    assert "step 4, blocks.0.feed_forward, counts (all_to_all, forward): waited 3." in said
    assert "(parallel.timeout=3)" in said
    assert "rank 1: lost (killed, stopped or cut off), last heard of" in said


def test_a_rank_sleeps_in_a_layer_and_ends_with_the_other(corpus, tmp_path):
    with live(corpus, tmp_path, *FAULTY, "router.sleep=1000", "router.at_layer=1") as lives:
        assert lives.codes(SLACK) == [1, 1]
        waiting, asleep = report(lives, 0), report(lives, 1)
    assert "step 4, blocks.1.feed_forward, counts (all_to_all, forward): waited 3." in waiting
    assert "rank 1: not arrived, last heard of" in waiting
    assert "step 4, in no collective for" in waiting
    assert "the run was ended by rank 0: waited 3." in asleep
    assert "after blocks.1.feed_forward.router, weights (all_gather, forward)" in asleep


@pytest.mark.parametrize("kind", ["less", pytest.param("more", marks=pytest.mark.slow)])
def test_a_rank_with_another_number_of_micro_batches(kind, corpus, tmp_path):
    """Nobody waits for the time-out: that both are in collectives which do not go together is plain."""
    options = ["plugins=[faulty_batches]", "parallel.timeout=600"]
    with live(corpus, tmp_path, *options, FAULTY_BATCHES=kind) as lives:
        assert lives.codes(2 * SLACK) == [1, 1]
        said = report(lives, 0) + report(lives, 1)
    places = ["the experts' load (all_reduce)", "blocks.0, weights (all_gather, forward)"]
    ahead, behind = places if kind == "less" else reversed(places)
    either = [f"rank 1 is in step 4, {ahead}, rank 0 in step 4, {behind}"]
    either.append(f"rank 0 is in step 4, {behind}, rank 1 in step 4, {ahead}")
    assert any(f"out of step: {text}" in said for text in either), said


@pytest.mark.parametrize("each", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_link_between_two_machines_is_cut(each, corpus, tmp_path):
    """``each`` ranks on either side, the store on the first; nothing tells a socket that its peer is gone."""
    if (why := netns.refused()) is not None:
        pytest.skip(why)
    run = tmp_path / "run"
    command = tiny.command(corpus, run, "train.steps=5000", *EP)
    with netns.Network(2) as network:
        places = [name for name in network.names for _ in range(each)]
        there = {"MASTER_ADDR": network.address(0), "MASTER_PORT": "29431", "LOCAL_WORLD_SIZE": str(each)}
        there |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "GLOO_SOCKET_IFNAME": netns.DEVICE}
        with Lives([command] * len(places), tmp_path, places, PYTHONPATH=TESTS, **there) as lives:
            until = time.monotonic() + 2 * SLACK
            while tiny.rows_written(run) < 3 and time.monotonic() < until:
                time.sleep(0.01)
            network.cut(1)
            assert lives.codes(SLACK) == [1] * len(places)
            said = [report(lives, rank) for rank in range(len(places))]
    for rank, text in enumerate(said):
        other_side = range(each, 2 * each) if rank < each else range(each)
        assert ": waited 3." in text or "ended by rank" in text or "the store has not answered" in text
        for other in other_side:
            assert f"rank {other}: lost (killed, stopped or cut off), last heard of" in text, text


def test_the_store_is_gone_and_the_ranks_end_in_seconds(corpus, tmp_path):
    """It lives in the launcher: nobody waits for the time-out, though the ranks still reach each other."""
    with live(corpus, tmp_path, "train.steps=100000", "parallel.timeout=600") as lives:
        until = time.monotonic() + 2 * SLACK
        while tiny.rows_written(tmp_path / "run") < 3 and time.monotonic() < until:
            time.sleep(0.01)
        del lives._store
        assert lives.codes(SLACK) == [1, 1]
        said = report(lives, 0) + report(lives, 1)
    assert "the store is gone, and with it the launcher or the rank that held it" in said


def test_rank_0_may_leave_first_with_the_store(corpus, tmp_path):
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": "29437", "FAULT": "late_to_leave"}
    faults = f"{Path(__file__).parent}:{TESTS}"
    command = tiny.command(corpus, tmp_path / "run", "train.steps=3", *EP, "plugins=[faults]")
    with Lives([command] * 2, tmp_path, PYTHONPATH=faults, **environment) as lives:
        assert lives.codes(2 * SLACK) == [0, 0], lives.output(1)


def test_a_folder_in_use_ends_all_ranks_with_its_own_code(corpus, tmp_path):
    lock = FolderLock(tmp_path / "run")
    lock.acquire()
    with live(corpus, tmp_path) as lives:
        assert lives.codes(2 * SLACK) == [3, 3]
        assert lives.output(0).startswith(
            f"moetrain: error: the run folder {tmp_path}/run is in use by process "
        )
        assert (lives.output(0).count("\n"), lives.output(1)) == (1, "")
    lock.release()
    assert tiny.files(tmp_path / "run") == []


def _out_of_step(rank: int, world: int) -> tuple[str, list[int]]:
    exchange = Exchange(dist.group.WORLD, "a", calls=Calls(["a", "b"]))
    _, _, received = exchange.counts(torch.tensor([[rank, 0], [3, 4]]))
    try:
        Exchange(dist.group.WORLD, "ab"[rank], calls=exchange.calls).counts(
            torch.zeros(2, 2, dtype=torch.int64)
        )
    except OutOfStepError as error:
        return str(error), received[1]
    return "no error", []


def test_counts_of_two_layers_are_not_taken_for_one_another():
    """They have the same size, and would be exchanged without an error of the back-end."""
    (first, received), (second, _) = run_ranks(_out_of_step, 2)
    assert received == [1, 0]
    assert first == "ranks out of step: rank 0 is in dispatch 2 (a), rank 1 in dispatch 2 (b)"
    assert second == "ranks out of step: rank 1 is in dispatch 2 (b), rank 0 in dispatch 2 (a)"


def _long_work(rank: int, world: int) -> str:
    with watching(0.5):
        with patiently("preparing the data"):
            time.sleep(1.7 if rank == 0 else 0)
            dist.barrier()
        time.sleep(1.3)  # both are busy, and nobody waits
        for _ in range(2):  # together they take longer than one may
            with watched("a sum"):
                time.sleep(0.3)
                dist.barrier()
    return "done"


def test_long_work_is_no_alarm():
    assert run_ranks(_long_work, 2) == ["done", "done"]
