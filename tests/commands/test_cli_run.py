"""What the command line does when it is right, and how a failure inside training leaves it.

Training itself is replaced by a function that records its config and makes its run folder: what is tested
is which configs reach it.
"""

import errno
import logging
import os
import re
import sys
import types
from pathlib import Path

import pytest

from moetrain.cli import main
from moetrain.config.hydra.compose import compose_train
from moetrain.config.validate import validate
from moetrain.errors import STOPPED, UserError


@pytest.fixture
def trained(monkeypatch):
    """Configs and notes that reached training, in order; ``trained.outcome(cfg)`` decides a run's end."""
    seen = []
    module = types.ModuleType("run")

    def train(cfg, read, notes=()):
        seen.append(cfg)
        calls.notes.append(list(notes))
        folder = Path(cfg.run.dir or os.path.join(cfg.run.root, cfg.run.name or "unnamed"))
        folder.mkdir(parents=True)
        return calls.outcome(cfg)

    calls = types.SimpleNamespace(configs=seen, notes=[], outcome=lambda cfg: True)
    module.train = train
    monkeypatch.setitem(sys.modules, "moetrain.train.run", module)
    return calls


def test_a_run_gets_its_composed_config(trained):
    assert main(["train", "run.name=a", "model.d_model=64"]) == 0
    (cfg,) = trained.configs
    assert cfg == compose_train(["run.name=a", "model.d_model=64"])
    assert os.listdir("runs") == ["a"]
    assert os.listdir(".") == ["runs"]


def test_a_run_is_validated_once_and_told_its_warnings(trained, monkeypatch):
    seen = []

    def counted(cfg, world=1):
        seen.append(cfg)
        return validate(cfg, world)

    monkeypatch.setattr("moetrain.config.checked.validate", counted)
    assert main(["train", "run.name=a", "train.steps=9"]) == 0
    assert seen == trained.configs
    assert trained.notes == [validate(seen[0])]
    assert trained.notes[0][0].startswith("train.steps=9 but schedule.horizon=")


@pytest.mark.parametrize(
    "launcher", [["--local_rank=0"], ["--local-rank=1"], ["--local-rank", "0"], ["--local_rank", "3"]]
)
def test_a_launchers_option_before_the_subcommand_is_ignored(launcher, trained):
    assert main([*launcher, "train", "run.name=a"]) == 0
    assert trained.configs[0].run.name == "a"


def test_a_run_that_is_asked_to_stop_ends_well(trained):
    trained.outcome = lambda cfg: False
    assert main(["train"]) == STOPPED


def full_disk():
    return OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")


def wrapped(cause):
    error = RuntimeError("the writer failed")
    error.__cause__ = cause
    return error


FAILURES = [
    (UserError("the loss is NaN\nat step 3"), 2, "moetrain: error: the loss is NaN at step 3\n"),
    (full_disk(), 1, "No space left on device: runs/a/metrics.jsonl"),
    (wrapped(full_disk()), 1, "No space left on device"),
    (OSError(errno.EROFS, "Read-only file system", "/ro"), 1, "Read-only file system: /ro"),
    (PermissionError(errno.EACCES, "Permission denied", "runs"), 1, "Permission denied: runs"),
]


@pytest.mark.parametrize(("error", "code", "said"), FAILURES, ids=[repr(f[0]) for f in FAILURES])
def test_a_failure_the_user_can_mend_is_one_line(error, code, said, trained, capsys):
    def fail(cfg):
        raise error

    trained.outcome = fail
    assert main(["train"]) == code
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("moetrain: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "error", [ValueError("ours"), wrapped(ValueError("ours")), OSError(errno.EIO, "I/O error")]
)
def test_a_failure_of_the_program_keeps_its_traceback(error, trained):
    def fail(cfg):
        raise error

    trained.outcome = fail
    with pytest.raises(type(error)) as caught:
        main(["train"])
    assert caught.value is error


def test_ctrl_c_is_quiet(trained, capsys):
    def stop(cfg):
        raise KeyboardInterrupt

    trained.outcome = stop
    assert main(["train"]) == 130
    assert capsys.readouterr().err == ""


def test_a_reader_that_went_away_is_no_error(trained):
    def stop(cfg):
        raise BrokenPipeError

    trained.outcome = stop
    assert main(["train"]) == 1


def test_a_sweep_names_each_jobs_folder(trained, capsys):
    logger, level = logging.getLogger("moetrain.data"), logging.getLogger().level
    assert main(["train", "-m", "run.name=s", "train.seed=3,5", "model=tiny", "train.steps=9"]) == 0
    assert not logger.disabled
    assert logging.getLogger().level == level
    assert [c.train.seed for c in trained.configs] == [3, 5]
    assert [c.run.name for c in trained.configs] == ["s_job0", "s_job1"]
    assert {"s_job0", "s_job1"} <= set(os.listdir("runs"))
    assert set(os.listdir("runs")) <= {"s_job0", "s_job1", "multirun.yaml"}
    assert os.listdir(".") == ["runs"]
    out = capsys.readouterr().out
    assert re.findall(r"job \d: .*", out) == [
        "job 0: run.name=s train.seed=3 model=tiny train.steps=9",
        "job 1: run.name=s train.seed=5 model=tiny train.steps=9",
    ]
    assert trained.notes == [validate(cfg) for cfg in trained.configs] != [[], []]


def test_a_sweep_without_a_name_is_named_by_its_time(trained):
    assert main(["train", "router.top_k=range(1,3)", "--multirun", "balance=none"]) == 0
    names = [c.run.name for c in trained.configs]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_job0", names[0])
    assert names[1] == names[0].removesuffix("0") + "1"
    assert [(c.router.top_k, len(c.balance.losses)) for c in trained.configs] == [(1, 0), (2, 0)]


def test_text_and_hydras_own_mode(trained):
    assert main(["train", "hydra.mode=MULTIRUN", "run.name=q,p", "train.sample_prompt=def f(x):"]) == 0
    assert [c.run.name for c in trained.configs] == ["q_job0", "p_job1"]
    assert [c.train.sample_prompt for c in trained.configs] == ["def f(x):"] * 2


def test_a_failed_job_does_not_keep_the_others_from_running(trained, capsys):
    def first_fails(cfg):
        if cfg.train.seed == 0:
            raise UserError("the loss is NaN")
        return True

    trained.outcome = first_fails
    assert main(["train", "-m", "run.name=s", "train.seed=0,1"]) == 2
    assert [c.train.seed for c in trained.configs] == [0, 1]
    assert "moetrain: error: job 0: the loss is NaN\n" in capsys.readouterr().err


@pytest.mark.real
def test_a_job_that_is_asked_to_stop_is_the_last(trained, capsys):
    trained.outcome = lambda cfg: cfg.train.seed != 1
    assert main(["train", "-m", "run.name=s", "train.seed=0,1,2"]) == STOPPED
    assert [c.train.seed for c in trained.configs] == [0, 1]
    assert "the sweep stopped in job 1; the same command with run.name=s goes on" in capsys.readouterr().out


def test_a_sweep_of_several_ranks_needs_a_name(trained, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    batch = ["data.seq_len=64", "train.micro_batch_size=1", "train.global_batch_tokens=256"]
    assert main(["train", "-m", "train.seed=0,1", *batch]) == 2
    assert "run.name or run.dir" in capsys.readouterr().err


def test_a_wrong_job_stops_the_sweep_before_its_first(trained, capsys):
    assert main(["train", "-m", "run.name=s", "router.top_k=1,2,99"]) == 2
    assert "job 2 (run.name=s router.top_k=99)" in capsys.readouterr().err
    assert trained.configs == []
    assert os.listdir(".") == []


def test_a_comparison_gets_its_arms(monkeypatch, trained):
    seen = []
    module = types.ModuleType("compare")
    module.compare = lambda cfg, arms, read: seen.append((cfg, arms)) or 4
    monkeypatch.setitem(sys.modules, "moetrain.train.compare", module)
    assert main(["train", "experiment=moe_vs_dense", "train.steps=9", "compare.seeds=[3]"]) == 4
    ((cfg, arms),) = seen
    assert cfg.compare.seeds == [3]
    assert list(arms) == ["moe", "dense"]
    (moe, told), (dense, _) = arms.values()
    assert [a.train.steps for a in (moe, dense)] == [9, 9]
    assert dense.model.num_experts == 0 < moe.model.num_experts
    assert told == validate(moe) != []
    assert trained.configs == []
    assert os.listdir(".") == []


def test_generate_reaches_its_app(monkeypatch, tmp_path):
    seen = []
    module = types.ModuleType("sample")
    module.generate_app = lambda cfg, read: seen.append(cfg) or 0
    monkeypatch.setitem(sys.modules, "moetrain.train.sample", module)
    assert main(["generate", f"checkpoint={tmp_path}", "prompt=def f(x):", "top_k=5"]) == 0
    assert (seen[0].prompt, seen[0].top_k, seen[0].temperature) == ("def f(x):", 5, 0.8)
