"""A run folder's config.yaml that somebody wrote: nothing is resolved, built or allocated before it fits."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import tiny
import yaml

from moetrain.config.hydra.compose import load_yaml
from moetrain.config.stored import run_config, trained_config
from moetrain.convert.open_model import open_model
from moetrain.errors import UserError
from moetrain.report.runs import read_run

DEEP = "[" * 10**5 + "]" * 10**5
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def opened(run: Path) -> None:
    open_model(run, trained_config)


def _set(run: Path, key: str, value: object) -> None:
    document = yaml.safe_load((run / "config.yaml").read_text())
    *parents, last = key.split(".")
    inside = document
    for name in parents:
        inside = inside[name]
    inside[last] = value
    (run / "config.yaml").write_text(yaml.safe_dump(document))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.init_std", -1.0, "model.init_std=-1.0 must be 0 or more"),
        ("model.d_ff_expert", 0, "model.d_ff_expert=0 must be 1 or more"),
        ("model.norm_eps", float("nan"), "model.norm_eps=nan must be a finite number"),
        ("model.rope_theta", float("inf"), "model.rope_theta=inf"),
        ("model.num_layers", 10**12, "model.num_layers=1000000000000, but its checkpoint holds"),
        ("model.num_layers", 10**4000, "model.num_layers=a huge number"),
        ("model.num_layers", 0, "model.num_layers=0 must be 1 or more"),
        ("model.num_layers", 3, "describes another model than .*step_00000012 holds: .*missing there"),
        ("model.d_model", 2**62, "model.d_model=4.612e[+]18, but its checkpoint holds"),
        ("model.d_model", 20, "describes another model"),
        ("model.vocab_size", 2**40, "model.vocab_size="),
        ("model.num_experts", 10**9, "model.num_experts="),
        (
            "model.num_experts",
            7,
            r"w_gate_up_EDCF is \[5, 16, 2, 12\] there and \[7, 16, 2, 12\] by the config",
        ),
        ("model.num_heads", 3, "model.num_heads=3 does not divide"),
        ("router.top_k", 99, "router.top_k=99"),
        ("router.capacity_factor", float("nan"), "router.capacity_factor=nan"),
        ("data.seq_len", 0, "data.seq_len=0"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_numbers_that_fit_the_types_only(run, key, value, said):
    _set(run, key, value)
    began = time.monotonic()
    for read, line in ((run_config, said), (opened, f"({said}|was changed since)")):
        with pytest.raises(UserError, match=rf"run/config.yaml.*{line}") as caught:
            read(run)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 2000
    assert time.monotonic() - began < 20


def test_numbers_of_a_folder_without_checkpoint_are_bounded(run):
    shutil.rmtree(run / "checkpoints")
    run_config(run)
    _set(run, "model.num_layers", 10**9)
    with pytest.raises(UserError, match=r"model.num_layers=1000000000, but at most 10000 can be read"):
        run_config(run)


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "checkpoint=RUN", "prompt=a"],
        ["export", "checkpoint=RUN", "target=OUT", "family=moetrain"],
        ["eval", "checkpoint=RUN", "data.path=RUN/samples"],
        ["train", "init_from=RUN", "run.name=never"],
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda text: text.replace("  group: sequence", "  group: ${oc.env:MOETRAIN_SECRET}"),
            "is an interpolation",
        ),
        (lambda text: BOMB + text, "line 2 has an alias"),
        (lambda text: text.replace("init_std: 0.02", "init_std: -1"), "model.init_std=-1.0 must be"),
        (
            lambda text: text.replace("num_layers: 2", f"num_layers: {10**12}"),
            "model.num_layers",
        ),
    ],
    ids=["secret", "bomb", "negative", "layers"],
)
@pytest.mark.usefixtures("training")
def test_every_command_that_opens_a_run_refuses(run, tmp_path, monkeypatch, capsys, command, change, said):
    monkeypatch.setenv("MOETRAIN_SECRET", "hush")
    text = (run / "config.yaml").read_text()
    assert change(text) != text
    (run / "config.yaml").write_text(change(text))
    out = tmp_path / "out"
    assert tiny.main([part.replace("RUN", str(run)).replace("OUT", str(out)) for part in command]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{run}/config.yaml" in err
    assert said in err
    assert "hush" not in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "alias"),
        (DEEP, "nesting depth|nested deeper"),
        ("a: !!timestamp x", "not YAML"),
        ("a: " + "9" * 5000, "not YAML"),
        ("? [1, 2]\n: 3", "config.yaml: "),
        ("{1: 2}", "config.yaml: "),
        ("router: ${nope}", "router is an interpolation"),
        ("model: ???", "config.yaml: "),
        ("router: {name: [topk]}", "config.yaml: "),
        ("a: 1\na: 2", "not YAML: found duplicate key"),
        ("x" * 1_000_001, "1000000 at the most"),
    ],
    ids=lambda value: value[:24],
)
def test_files_that_are_no_config(tmp_path, text, said):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        load_yaml(file)
    assert "\n" not in str(caught.value)
    assert "config.yaml" in str(caught.value)
    read_run(tmp_path).config()  # a report shows the text and goes on


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("${x}", True),
        ("a ${oc.env:HOME}", True),
        (r"\\${x}", True),
        ("$x", False),
        (r"\${x}", False),
        ("{x}", False),
    ],
)
def test_dollars_are_text_or_refused(run, text, refused):
    _set(run, "train.sample_prompt", text)
    if refused:
        with pytest.raises(UserError, match=r"train\.sample_prompt is an interpolation"):
            run_config(run)
    else:
        assert run_config(run).train.sample_prompt == text.replace(r"\$", "$")


def test_interpolations_are_found_in_lists_and_mappings(run):
    _set(run, "compare.arms", {"a": ["x=1", "y=${oc.env:HOME}"]})
    with pytest.raises(UserError, match=r"compare\.arms\.a\.1 is an interpolation"):
        run_config(run)
