"""Wrong command lines: exit code 2, one line with key, value and what is allowed, nothing left behind."""

import os
import subprocess
import sys
import types

import pytest

from moetrain.cli import main

BAD = [
    # unknown keys
    ("train model.d_modl=64", "model.d_modl=64", "did you mean model.d_model?", "num_layers"),
    ("train modle=tiny", "unknown key modle", "did you mean model?", "experiment"),
    ("train steps=10", "unknown key steps", "did you mean train.steps?"),
    (
        "train data.path=/x",
        "unknown key data.path",
        "(data=chat, data=hub, data=local and data=prompt",
    ),
    ("train data.parts.a.kind=local", "unknown key data.parts", "data=mixture has it"),
    ("train +model.extra=1", "unknown key model.extra", "d_model"),
    ("train router.capacity_facto=1.5", "did you mean router.capacity_factor?"),
    ("train balance.losses=[{nam:z}]", "balance.losses", "unknown key", "did you mean balance.losses: name?"),
    # wrong types
    ("train model.d_model=wide", "model.d_model", "a whole number", "'wide'"),
    ("train train.steps=1.5", "train.steps", "a whole number", "1.5"),
    ("train train.steps=null", "train.steps", "cannot be null"),
    ("train train.deterministic=perhaps", "train.deterministic", "true or false", "'perhaps'"),
    ("train train=5", "train=5", "a group of keys", "steps"),
    ("train model=5", "model=5", "a group", "one of its options"),
    ("train ~train.steps", "train.steps", "cannot be deleted"),
    # enum values
    ("train train.precision=fp16", "train.precision", "fp32, bf16, fp64", "not fp16"),
    ("train tracker=wandb tracker.mode=onlin", "tracker.mode", "did you mean online?"),
    ("train balance.losses=[{name:swich}]", "balance.losses", "gshard_first", "did you mean switch?"),
    # unknown options of a group
    ("train router=tokp", "router=tokp", "topk", "did you mean topk?"),
    ("train model=tny", "model=tny", "did you mean tiny?"),
    ("train experiment=moe_vs_dens", "experiment=moe_vs_dens", "did you mean moe_vs_dense?"),
    # grammar
    ("train model", "cannot read 'model'", "key=value"),
    ("train model.d_model=3=4", "cannot read 'model.d_model=3=4'", "quote"),
    ("train =3", "cannot read '=3'"),
    ("train train.seed=1,2", "train.seed=1,2", "-m"),
    ("train balance.losses=[{name:", "cannot read", "balance.losses"),
    # missing values
    ("train data=local", "data.path has no value"),
    ("train ~router", "router has no value"),
    ("train run.name=${nothing}", "run.name", "nothing"),
    ("generate prompt=x", "checkpoint has no value"),
    # flags and subcommands
    ("trian", "unknown subcommand trian", "did you mean train?"),
    ("model=tiny", "moetrain train model=tiny"),
    ("--verison", "unknown option --verison", "did you mean --version?"),
    ("train --mutlirun", "--mutlirun", "did you mean --multirun?"),
    ("train --cfg jb", "--cfg", "job", "hydra"),
    ("train --cfg job -m", "only one of"),
    ("train --resolve", "--resolve", "--cfg"),
    ("train --config-dir nowhere", "--config-dir", "nowhere", "no such folder"),
    ("train --config-name nothing", "--config-name nothing"),
    ("train --experimental-rerun=x.pickle", "unknown option --experimental-rerun"),
    ("generate -m seed=1,2 checkpoint=x prompt=y", "no sweeps"),
    ("data fetch wiki", "fetch domains"),
    ("report", "RUN"),
    ("report nowhere", "nowhere"),
    ("status nowhere", "nowhere"),
    ("doctor now", "doctor", "now"),
    # plugins and tags
    ("train plugins=[no_such_package_here]", "plugins", "no_such_package_here", "PYTHONPATH"),
    ("train plugins=3", "plugins=3", "plugins=[my_routers]"),
    ("train router.name=hash", "router.name=hash", "router=hash"),
    ("train data.source=hub", "data.source=hub", "data=hub"),
    # impossible combinations
    ("train model.num_heads=3", "model.num_heads=3", "model.d_model="),
    ("train balance=dynmoe", "router=topk", "penalty"),
    ("train parallel.ep=2", "parallel.ep=2", "multiple of 2 ranks"),
    ("train parallel.ep=3", "parallel.ep=3", "model.num_experts=8"),
    ("train data=local data.path=nowhere/*.txt", "data.path=nowhere/*.txt", "no file"),
    ("train resume=nowhere", "resume=nowhere", "auto"),
    ("train train.device=tpu", "train.device=tpu", "cuda"),
    ("generate checkpoint=nowhere prompt=x", "checkpoint=nowhere"),
    # sweeps are checked before their first job
    ("train -m router.top_k=1,9", "router.top_k=9", " num_experts=8"),
    ("train -m router=topk,tokp", "router=tokp", "did you mean topk?"),
    ("train -m model.d_model", "cannot read 'model.d_model'"),
    ("train -m hydra/sweeper=nothing train.seed=1", "hydra/sweeper=nothing"),
    ("train -m optim.lr=interval(0,1)", "interval"),
    # comparisons are checked before their first run
    ("train 'compare.arms={a: [\"router.top_k=99\"]}'", "compare.arms.a", "router.top_k=99"),
    ("train 'compare.arms={a: [\"modle=tiny\"]}'", "compare.arms.a", "did you mean model?"),
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """An empty working directory, and no training should a wrong line be accepted."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MOETRAIN_TEST_UNSET", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("run", "compare", "sample"):
        accepted = types.ModuleType(name)

        def reached(*args, name=name):
            raise AssertionError(f"moetrain.train.{name} was reached")

        accepted.train = accepted.compare = accepted.generate_app = reached
        monkeypatch.setitem(sys.modules, f"moetrain.train.{name}", accepted)


def _split(line):
    """As a shell does, but ``{...}`` without quotes stays one word."""
    import shlex

    return shlex.split(line)


@pytest.mark.parametrize(("line", "fragments"), [(b[0], b[1:]) for b in BAD], ids=[b[0] for b in BAD])
def test_a_wrong_command_line_is_one_line_and_code_2(line, fragments, capsys, tmp_path):
    code = main(_split(line))
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("moetrain: error: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    missing = [f for f in fragments if f not in err]
    assert not missing, err
    assert os.listdir(tmp_path) == []


def test_a_yaml_of_the_users_is_named_with_its_mistake(capsys, tmp_path, monkeypatch):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    cases = {
        "d_modl: 64": ["model/bad.yaml", "model.d_modl", "did you mean model.d_model?"],
        "d_model: wide": ["model/bad.yaml", "model.d_model", "a whole number"],
        "d_model: [1": ["bad.yaml", "line 1", "not YAML"],
        "qk_norm: half": ["model/bad.yaml", "model.qk_norm", "none, head, head_after_rope, full"],
    }
    for text, fragments in cases.items():
        (tmp_path / "mine" / "model" / "bad.yaml").write_text(text)
        assert main(["train", "--config-dir", "mine", "model=bad"]) == 2
        err = capsys.readouterr().err
        assert [f for f in fragments if f not in err] == [], err
        assert err.count("\n") == 1, err


@pytest.mark.parametrize("world", ["0", "two", "-1"])
def test_a_broken_environment_is_told(world, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world)
    assert main(["train"]) == 2
    assert f"WORLD_SIZE={world}" in capsys.readouterr().err


def test_only_rank_0_speaks_and_all_exit_alike(capsys, monkeypatch, tmp_path):
    note = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(note))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", "modle=tiny"]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == lines
        assert captured.out == ""
        assert "unknown key modle" in note.read_text()  # torchrun shows this for a rank that is silent
        note.unlink()


@pytest.mark.parametrize("line", ["train model.d_modl=64", "trian"])
def test_the_same_in_a_process_of_its_own(line, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "moetrain", *line.split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env | {"OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("moetrain: error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert os.listdir(tmp_path) == []
