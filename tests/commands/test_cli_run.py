"""What the command line does when it is right, and how a failure inside training leaves it.

Training itself is replaced by a function that records its config and makes its run folder: what is tested
is which configs reach it. One sweep at the end trains for real.
"""

import errno
import logging
import os
import re
import shlex
import signal
import sys
import types
from pathlib import Path

import pytest
import tiny
import yaml

import moetrain
from moetrain.cli import HELP, main
from moetrain.config.help import group_options
from moetrain.config.hydra.compose import compose_train, load_yaml
from moetrain.config.validate import validate
from moetrain.errors import STOPPED, UserError

TINY = [
    "model.d_model=16",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.num_experts=3",
    "model.d_ff_expert=8",
    "data.tokenizer.kind=bytes",
    "data.seq_len=16",
    "train.micro_batch_size=2",
    "train.global_batch_tokens=32",
    "train.steps=2",
    "schedule.horizon=2",
    "schedule.warmup_steps=1",
    "train.device=cpu",
    "train.sample_tokens=2",
    "train.threads=1",
    "train.eval_samples=2",
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def trained(monkeypatch):
    """Configs that reached training, in order; ``trained.outcome(cfg)`` decides how each run ends."""
    seen = []
    module = types.ModuleType("run")

    def train(cfg, notes=()):
        seen.append(cfg)
        folder = Path(cfg.run.dir or os.path.join(cfg.run.root, cfg.run.name or "unnamed"))
        folder.mkdir(parents=True)
        return calls.outcome(cfg)

    calls = types.SimpleNamespace(configs=seen, outcome=lambda cfg: True)
    module.train = train
    monkeypatch.setitem(sys.modules, "moetrain.train.run", module)
    return calls


def test_a_run_gets_its_composed_config(trained):
    assert main(["train", "run.name=a", "model.d_model=64"]) == 0
    (cfg,) = trained.configs
    assert cfg == compose_train(["run.name=a", "model.d_model=64"])
    assert os.listdir("runs") == ["a"]
    assert os.listdir(".") == ["runs"]


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


# sweeps


def test_a_sweep_names_each_jobs_folder(trained, capsys):
    logger, level = logging.getLogger("moetrain.data"), logging.getLogger().level
    assert main(["train", "-m", "run.name=s", "train.seed=3,5", "model=tiny"]) == 0
    assert not logger.disabled
    assert logging.getLogger().level == level
    assert [c.train.seed for c in trained.configs] == [3, 5]
    assert [c.run.name for c in trained.configs] == ["s_job0", "s_job1"]
    assert {"s_job0", "s_job1"} <= set(os.listdir("runs"))
    assert set(os.listdir("runs")) <= {"s_job0", "s_job1", "multirun.yaml"}
    assert os.listdir(".") == ["runs"]
    out = capsys.readouterr().out
    assert re.findall(r"job \d: .*", out) == [
        "job 0: run.name=s train.seed=3 model=tiny",
        "job 1: run.name=s train.seed=5 model=tiny",
    ]


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
    module.compare = lambda cfg, arms: seen.append((cfg, arms)) or 4
    monkeypatch.setitem(sys.modules, "moetrain.train.compare", module)
    assert main(["train", "experiment=moe_vs_dense", "train.steps=9", "compare.seeds=[3]"]) == 4
    ((cfg, arms),) = seen
    assert cfg.compare.seeds == [3]
    assert list(arms) == ["moe", "dense"]
    assert [a.train.steps for a in arms.values()] == [9, 9]
    assert arms["dense"].model.num_experts == 0 < arms["moe"].model.num_experts
    assert trained.configs == []
    assert os.listdir(".") == []


# pages


def test_the_printed_config_is_accepted_back(capsys, tmp_path):
    overrides = [
        "router=deepseek_v3",
        "model.num_experts=16",
        "optim=muon",
        "train.precision=bf16",
        "parallel=ddp",
    ]
    assert main(["train", "--cfg", "job", *overrides]) == 0
    text = capsys.readouterr().out
    plain = yaml.safe_load(text)
    assert "hydra" not in plain
    assert plain["train"]["precision"] == "bf16"
    assert plain["router"]["score"] == "sigmoid"
    assert os.listdir(".") == []
    Path("printed.yaml").write_text(text)
    assert main(["train", "--cfg", "job", "--resolve", *overrides]) == 0
    Path("values.yaml").write_text(capsys.readouterr().out)
    assert load_yaml("values.yaml") == compose_train(overrides)
    assert main(["train", "--config-dir", ".", "--config-name", "printed", "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == plain


def test_a_part_of_the_config_resolved(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", "parallel=ddp", "--cfg", "job", "--package", "parallel", "--resolve"]) == 0
    assert "dp_replicate: 4" in capsys.readouterr().out.splitlines()
    assert main(["train", "data=local", "--cfg", "job", "-p", "data"]) == 0
    assert "path: ???" in capsys.readouterr().out


def test_the_help_of_train_lists_groups_and_keys(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for group, names in group_options().items():
        assert re.search(rf"^  {group} +{', '.join(names)}$", out, re.M)
    assert " _topk" not in out
    assert "moetrain train -m router.top_k=1,2,4" in out
    assert "micro_batch_size: " in out
    assert main(["generate", "--help"]) == 0
    assert "max_new_tokens: 128" in capsys.readouterr().out
    assert main(["train", "--hydra-help"]) == 0
    assert "hydra" in capsys.readouterr().out.lower()
    assert os.listdir(".") == []


def test_info_prints_and_leaves_the_loggers_alone(capsys):
    before = logging.getLogger().handlers[:]
    assert main(["train", "--info", "defaults"]) == 0
    assert "router/topk" in capsys.readouterr().out
    assert logging.getLogger().handlers == before
    assert not logging.getLogger("hydra").disabled


def test_only_rank_0_prints_pages(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "--cfg", "job"]) == 0
    assert capsys.readouterr().out == ""


def test_generate_reaches_its_app(monkeypatch, tmp_path):
    seen = []
    module = types.ModuleType("sample")
    module.generate_app = lambda cfg: seen.append(cfg) or 0
    monkeypatch.setitem(sys.modules, "moetrain.train.sample", module)
    assert main(["generate", f"checkpoint={tmp_path}", "prompt=def f(x):", "top_k=5"]) == 0
    assert (seen[0].prompt, seen[0].top_k, seen[0].temperature) == ("def f(x):", 5, 0.8)


def test_plain_pages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"moetrain {moetrain.__version__}\n"
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == HELP
    assert len(re.findall(r"^  (moetrain|torchrun) ", HELP, re.M)) == 16
    assert main([]) == 2
    assert capsys.readouterr().out == HELP
    for command in ("report", "status", "data"):
        assert main([command, "--help"]) == 0
        assert f"moetrain {command}" in capsys.readouterr().out


def test_doctor_tells_versions_and_devices(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("moetrain", "python", "torch", "hydra-core", "wandb", "C++ compiler", "cpu", "gpu"):
        assert re.search(rf"^{re.escape(name)} .*\S", out, re.M), name


def test_the_commands_on_the_help_page_are_valid():
    lines = [line for line in HELP.splitlines()[2:] if "moetrain train" in line and "init_from" not in line]
    trains = [line.split("  ")[1] for line in lines if not line.startswith("Also")]
    assert len(trains) == 7
    Path("my").mkdir()
    Path("my/text.txt").write_text("text")
    for command in trains:
        overrides = shlex.split(command.partition("moetrain train")[2].replace("/my/", "my/"))
        cfg = compose_train([o for o in overrides if not o.startswith(("-m", "router.top_k=1,"))])
        validate(cfg, 8 if "--nproc-per-node 8" in command else 1)


@pytest.mark.real
def test_a_sweep_that_trains_for_real(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document {i}: " + "some words to learn. " * 9)
    line = [
        "train",
        "-m",
        *TINY,
        "data=local",
        f"data.path={tmp_path}/text",
        f"data.cache_dir={tmp_path}/cache",
    ]
    assert main([*line, "data.val_fraction=0.2", f"run.dir={tmp_path}/sweep", "train.seed=0,1"]) == 0
    for num in (0, 1):
        folder = tmp_path / "sweep" / f"job{num}"
        assert load_yaml(folder / "config.yaml").train.seed == num
        assert (folder / "metrics.jsonl").stat().st_size > 0
        assert (folder / "report.html").exists()


@pytest.mark.real
def test_a_sweep_that_is_asked_to_stop_begins_no_further_job(faulty, corpus, tmp_path, capsys):
    folder = tmp_path / "sweep"
    sweep = ["train", "-m", *tiny.command(corpus, folder)[1:], "router.top_k=1,2", "train.steps=4"]
    sweep += [*faulty, "checkpoint.every=2"]
    with tiny.alone():
        assert main([*sweep, "router.at_step=1", f"router.signal={int(signal.SIGINT)}"]) == STOPPED
    said = capsys.readouterr().out
    assert f"the sweep stopped in job 0; the same command with run.dir={folder} goes on" in said
    assert not (folder / "job1").exists()
    assert len(tiny.steps(folder / "job0")) == 2
    with tiny.alone():
        assert main(sweep) == 0
    assert [len(tiny.steps(folder / f"job{num}")) for num in (0, 1)] == [4, 4]
