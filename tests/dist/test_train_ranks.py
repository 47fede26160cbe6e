"""Whole runs on several ranks: the same run as on one, resumed, stopped, broken, and with a rank lost.

Every rank is a process of its own that runs the command line. torchrun itself is in tests/launch.
"""

from __future__ import annotations

import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from lives import Lives

from moetrain.config.hydra.compose import compose_train
from moetrain.data import Corpus
from moetrain.data import prepare as data_prepare
from moetrain.data.options import DataConfig
from moetrain.errors import STOPPED
from moetrain.parallel.ranks import run_ranks
from moetrain.train import start as train_start

ONE_EACH = "train.micro_batch_size=1"
FAULTY = ["plugins=[faulty_router]", "router=faulty", "resume_changes=[router]"]
FAULTY_PATH = {"PYTHONPATH": str(Path(tiny.__file__).parent)}


def live(corpus: Path, folder: Path, *overrides: str, world: int = 2) -> Lives:
    """The tiny run on ``world`` ranks, each beginning at once."""
    return Lives([tiny.command(corpus, folder, *overrides)] * world, folder.parent, **FAULTY_PATH)


def finish(corpus: Path, run: Path, *overrides: str, world: int = 2, code: int = 0) -> str:
    """Run until all ranks end with ``code``; what rank 0 printed."""
    with live(corpus, run, *overrides, world=world) as lives:
        assert lives.codes() == [code] * world, [lives.output(rank) for rank in range(world)]
        return lives.output(0)


@pytest.fixture(scope="module")
def pair(corpus, tmp_path_factory) -> Path:
    """``tiny.TRAINED`` on two ranks that nobody touched."""
    run = tmp_path_factory.mktemp("pair") / "run"
    finish(corpus, run, *tiny.TRAINED)
    return run


def assert_close_rows(one: list[dict], other: list[dict], tolerance: float) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert {key: value for key, value in a.items() if abs(value - b[key]) > tolerance} == {}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_is_the_same_on_any_number_of_ranks(world, corpus, tmp_path):
    """In fp64, evaluations included: the held-out sequences do not divide by the ranks."""
    options = [*tiny.TRAINED, "train.precision=fp64", ONE_EACH, "balance=aux_free", "train.eval_samples=7"]
    options += ["data.cross_document_attention=true", "router.capacity_factor=1.2", "router.jitter=0.1"]
    with tiny.alone():
        assert tiny.train(corpus, tmp_path / "one", *options) == 0
    run = tmp_path / "several"
    finish(corpus, run, *options, world=world)
    assert_close_rows(tiny.steps(tmp_path / "one"), tiny.steps(run), 1e-9)
    assert_close_rows(tiny.evaluations(tmp_path / "one"), tiny.evaluations(run), 1e-9)


@pytest.mark.real
def test_spread_experts_train_alike_and_load_anywhere(corpus, tmp_path):
    """In fp64: the whole curve, then one process goes on from the ranks' checkpoint, and they from its."""
    options = [*tiny.TRAINED, "train.precision=fp64", ONE_EACH, "balance=aux_free", "train.eval_samples=7"]
    options += ["model.num_experts=6", "model.num_shared_experts=1", "router.capacity_factor=1.2"]
    spread = [*options, "parallel.ep=2"]
    one, several = tmp_path / "one", tmp_path / "several"
    with tiny.alone():
        assert tiny.train(corpus, one, *options) == 0
    finish(corpus, several, *spread)
    assert_close_rows(tiny.steps(one), tiny.steps(several), 1e-9)
    assert_close_rows(tiny.evaluations(one), tiny.evaluations(several), 1e-9)
    begun_by_several, begun_by_one = cut(several, tmp_path / "a", 5), cut(one, tmp_path / "b", 5)
    with tiny.alone():
        assert tiny.train(corpus, begun_by_several, *options) == 0
    finish(corpus, begun_by_one, *spread)
    for run in (begun_by_several, begun_by_one):
        assert_close_rows(tiny.steps(one), tiny.steps(run), 1e-9)
        mine, theirs = (tiny.contents(tiny.checkpoint(r, 12))[0] for r in (run, one))
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.allclose(mine[name].double(), tensor.double(), rtol=0, atol=1e-9), name


def cut(run: Path, copy: Path, step: int) -> Path:
    shutil.copytree(run, copy)
    for later in tiny.checkpoints(copy):
        if later > step:
            shutil.rmtree(tiny.checkpoint(copy, later))
    return copy


def test_two_ranks_continue_bit_for_bit(corpus, pair, tmp_path):
    run = cut(pair, tmp_path / "run", 5)
    assert "step_00000005: 5 steps done" in finish(corpus, run, *tiny.TRAINED)
    assert tiny.steps(run) == tiny.steps(pair)
    assert tiny.evaluations(run) == tiny.evaluations(pair)
    tiny.assert_same_state(tiny.checkpoint(run, 12), tiny.checkpoint(pair, 12))


def test_one_rank_continues_what_two_began(corpus, pair, tmp_path):
    run = cut(pair, tmp_path / "run", 5)
    with tiny.alone():
        assert tiny.train(corpus, run, *tiny.TRAINED) == 0
    assert_close_rows(tiny.steps(run), tiny.steps(pair), 1e-3)  # fp32: summed in another order
    assert tiny.steps(run)[:5] == tiny.steps(pair)[:5]


@pytest.mark.real
@pytest.mark.parametrize("asked", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_rank_stops_both_at_the_same_step(asked, corpus, pair, tmp_path):
    run = tmp_path / "run"
    options = [*tiny.TRAINED, *FAULTY, f"router.signal={int(signal.SIGTERM)}", "router.at_step=3"]
    said = finish(corpus, run, *options, f"router.rank={asked}", code=STOPPED)
    assert "stopped after step 4 (" in said
    assert ("another rank was asked to stop" in said) == (asked == 1)
    assert tiny.checkpoints(run) == [4]
    finish(corpus, run, *options)
    assert tiny.steps(run) == tiny.steps(pair)
    tiny.assert_same_state(tiny.checkpoint(run, 12), tiny.checkpoint(pair, 12))


@pytest.mark.slow  # the watchdog's tests and the launcher's kill ranks in every run
@pytest.mark.parametrize("lost", [0, 1])
def test_when_a_rank_is_killed_the_other_ends_without_saving(lost, corpus, pair, tmp_path):
    run = tmp_path / "run"
    options = [*tiny.TRAINED, *FAULTY]
    fault = [f"router.signal={int(signal.SIGKILL)}", "router.at_step=7", f"router.rank={lost}"]
    began = time.monotonic()
    with live(corpus, run, *options, *fault) as lives:
        codes = lives.codes()
        said = lives.output(1 - lost)
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == 1, said
    assert f"moetrain: error: rank {1 - lost}" in said
    assert "Traceback" not in said
    assert time.monotonic() - began < 100  # and not the ten minutes of a collective's time-out
    assert tiny.checkpoints(run) == [5]
    assert not (run / "summary.json").exists()
    finish(corpus, run, *options)
    assert tiny.steps(run) == tiny.steps(pair)
    tiny.assert_same_state(tiny.checkpoint(run, 12), tiny.checkpoint(pair, 12))


@pytest.mark.real
def test_a_bad_sample_of_one_rank_is_everybodys(corpus, tmp_path):
    """Sample 19 is in the share of rank 1, and rank 0 speaks."""
    options = ["train.steps=9", "checkpoint.every=3", *FAULTY, "router.samples=[19]"]
    with live(corpus, tmp_path / "stop", *options) as lives:
        assert lives.codes() == [1, 1]
        said, silent = lives.output(0), lives.output(1)
    assert "moetrain: error: step 5: the loss is nan; first parameter with a gradient that is not" in said
    assert "samples 16 to 19" in said
    assert "Traceback" not in said + silent
    said = finish(corpus, tmp_path / "back", *options, "train.on_nonfinite=rollback")
    assert "step 5's batch is left out" in said
    assert [row["step"] for row in tiny.steps(tmp_path / "back")] == [1, 2, 3, 4, 6, 7, 8, 9]


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_nan_in_a_solver_of_one_rank_is_everybodys(policy, corpus, tmp_path):
    """Rank 1 has no balanced plan in step 3: neither waits for the other, and both leave the step out."""
    run = tmp_path / "run"
    options = ["train.steps=5", "checkpoint.every=1", "plugins=[faulty_input]", "router=sinkhorn"]
    command = tiny.command(corpus, run, *options, f"train.on_nonfinite={policy}")
    with Lives([command] * 2, tmp_path, **FAULTY_PATH, FAULTY_STEP="2", FAULTY_RANK="1") as lives:
        assert lives.codes() == [0, 0], lives.output(1)
        assert "step 3: the loss is nan" in lives.output(0)
    finite = [row["step"] for row in tiny.steps(run) if row["train/loss"] is not None]
    assert finite == [1, 2, 4, 5]


@pytest.mark.real
def test_an_error_of_rank_0_ends_both(tmp_path):
    """Rank 0 prepares the text alone; the other waits for it, and must not wait for ever."""
    folder = tmp_path / "corpus"
    (folder / "text").mkdir(parents=True)
    (folder / "text" / "a.txt").write_text("short")
    with live(folder, tmp_path / "run") as lives:
        codes = lives.codes()
        assert codes[0] == 2, lives.output(0)
        assert codes[1] != 0
    assert lives.output(0).count("moetrain: error: ") == 1
    assert tiny.files(tmp_path / "run") == []


def test_the_ranks_share_one_folder_without_a_name(corpus, tmp_path):
    """Each rank starts when it starts; rank 0's clock names the folder."""
    arguments = [o for o in tiny.command(corpus, tmp_path, "train.steps=1") if not o.startswith("run.dir=")]
    with Lives([[*arguments, f"run.root={tmp_path}/runs"]] * 2, tmp_path) as lives:
        assert lives.codes() == [0, 0], lives.output(0)
    assert len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.real
def test_a_comparison_on_two_ranks(corpus, tmp_path):
    """Two arms, one after the other, on the same ranks; and once more, when all is done."""
    options = ["compare.arms={a: [], b: ['optim.lr=0.01']}", "compare.seeds=[3]", "train.steps=2"]
    run = tmp_path / "run"
    assert "comparison.md" in finish(corpus, run, *options)
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["a", "b"]
    assert "is done already" in finish(corpus, run, *options)


def _prepares_slowly(rank: int, world: int, arguments: list[str]) -> int:
    dist.init_process_group("gloo", timeout=timedelta(seconds=1))
    cfg = compose_train(arguments)

    def prepare(data: DataConfig, seed: int) -> Corpus:
        time.sleep(2.5 if rank == 0 else 0)
        return data_prepare(data, seed)

    train_start.prepare = prepare
    return len(train_start._prepare_in_turn(cfg).train)


@pytest.mark.real
def test_preparing_the_text_may_take_longer_than_a_collective(corpus, tmp_path):
    lengths = run_ranks(_prepares_slowly, 2, tiny.command(corpus, tmp_path)[1:], init=False)
    assert lengths[0] == lengths[1] > 0
