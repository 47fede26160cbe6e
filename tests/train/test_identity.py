"""A run folder's files against its checkpoint, runs whose first folder is gone, and repeated sweeps."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import yaml

from moetrain.cli import main
from moetrain.config.hydra.compose import load_yaml

pytestmark = pytest.mark.usefixtures("training")
BPE = ["data.tokenizer.kind=bpe", "data.tokenizer.vocab_size=300", "train.steps=2", "model.num_layers=1"]


@pytest.fixture(scope="module")
def bpe(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a tokenizer of its own; nobody may change it."""
    run = tmp_path_factory.mktemp("bpe") / "run"
    with tiny.alone():
        assert tiny.train(corpus, run, *BPE) == 0
    return run


def swap_letters(run: Path) -> str:
    """Two entries of the vocabulary change places."""
    file = run / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = sorted(vocabulary)[40:42]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(content))
    return f"{run}/tokenizer was changed since {tiny.checkpoint(run, 2)} was written"


def turn_slower(run: Path) -> str:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("rope_theta: 10000.0", "rope_theta: 100"))
    change = "model.rope_theta was 10000.0, now 100.0"
    return f"{config} was changed since {tiny.checkpoint(run, 2)} was written: {change}"


def started_from(start: Path, corpus: Path, run: Path) -> list[str]:
    """The command that trains what lies in ``start``, whose folder decides model and tokenizer."""
    data = ["data=local", f"data.path={corpus}/text", f"data.cache_dir={corpus}/cache", "data.seq_len=16"]
    sizes = ["train.micro_batch_size=2", "train.global_batch_tokens=64", "train.sample_tokens=1"]
    return [
        "train",
        f"init_from={start}/",
        f"run.dir={run}",
        *data,
        *sizes,
        "train.threads=1",
        "train.steps=2",
    ]


COMMANDS = {
    "generate": ["generate", "checkpoint={run}", "prompt=a", "max_new_tokens=1", "device=cpu"],
    "eval": ["eval", "checkpoint={run}", "data.path={text}", "device=cpu"],
    "export": ["export", "checkpoint={run}", "target={new}"],
    "upcycle": ["upcycle", "source={run}", "target={new}", "method=grow"],
}


@pytest.mark.parametrize("change", [swap_letters, turn_slower], ids=["tokenizer", "config"])
@pytest.mark.parametrize("command", [*COMMANDS, "init_from"])
def test_a_file_changed_since_the_checkpoint_is_named(command, change, corpus, bpe, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(bpe, run)
    said = change(run)
    names = {"run": run, "text": corpus / "text" / "00.txt", "new": tmp_path / "new"}
    if command == "init_from":
        assert main(started_from(run, corpus, tmp_path / "new")) == 2
    else:
        assert main([part.format(**names) for part in COMMANDS[command]]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1, err


def test_a_file_laid_out_anew_is_the_same(bpe, tmp_path, capsys):
    """Another spelling of the same values, and keys in another order."""
    run = tmp_path / "run"
    shutil.copytree(bpe, run)
    config, tokenizer = run / "config.yaml", run / "tokenizer" / "tokenizer.json"
    content = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(content, default_flow_style=True).replace("10000.0", "1.0e+4"))
    tokenizer.write_text(json.dumps(dict(reversed(json.loads(tokenizer.read_text()).items()))))
    names = {"run": run}
    assert main([part.format(**names) for part in COMMANDS["generate"]]) == 0
    assert capsys.readouterr().out.startswith("a")


def test_a_resumed_run_mends_its_tokenizer_and_says_so(corpus, bpe, tmp_path, capsys):
    """The hash of the tokens has shown that the tokenizer in use is the right one."""
    run = tmp_path / "run"
    shutil.copytree(bpe, run)
    swap_letters(run)
    assert tiny.train(corpus, run, *BPE, "train.steps=3") == 0
    assert f"{run}/tokenizer is not as {tiny.checkpoint(run, 2)} knows it" in capsys.readouterr().out
    mended, before = (json.loads((r / "tokenizer/tokenizer.json").read_text()) for r in (run, bpe))
    assert mended == before


def test_a_config_changed_along_with_the_command(corpus, bpe, tmp_path, capsys):
    """File and command agree; the checkpoint knows better, unless the change is accepted by name."""
    run = tmp_path / "run"
    shutil.copytree(bpe, run)
    turn_slower(run)
    command = [*BPE, "train.steps=3", "model.rope_theta=100"]
    assert tiny.train(corpus, run, *command) == 2
    assert "model.rope_theta was 10000.0, now 100.0" in capsys.readouterr().err
    assert tiny.train(corpus, run, *command, "resume_changes=[model.rope_theta]") == 0
    assert tiny.train(corpus, run, *command, "train.steps=4") == 0  # its checkpoint is of the new value


def test_a_checkpoint_of_before_is_opened_without_a_word(corpus, bpe, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    monkeypatch.setattr("moetrain.train.run.identity_of", lambda cfg, run_dir: None)
    assert tiny.train(corpus, run, *BPE) == 0
    turn_slower(run)
    assert main([part.format(run=run) for part in COMMANDS["generate"]]) == 0


@pytest.mark.parametrize("folder", ["gone", "changed"])
def test_a_run_outlives_the_folder_it_began_with(folder, corpus, bpe, tmp_path, capsys):
    start, run = tmp_path / "start", tmp_path / "run"
    shutil.copytree(bpe, start)
    command = started_from(start, corpus, run)
    assert main(command) == 0
    if folder == "changed":
        turn_slower(start)
        swap_letters(start)
    else:
        shutil.rmtree(start)
    capsys.readouterr()
    assert main([*command, "train.steps=3"]) == 0
    said = capsys.readouterr()
    assert "2 steps done" in said.out
    assert "changed" not in said.out + said.err
    described = replace(load_yaml(bpe / "config.yaml").model, vocab_size=300)
    assert load_yaml(run / "config.yaml").model == described
    shutil.rmtree(run)
    assert main([*command, "train.steps=3"]) == 2
    refused = "does not exist" if folder == "gone" else "was changed since"
    assert refused in capsys.readouterr().err


@pytest.mark.real
def test_a_sweep_repeated_with_other_values_is_refused(corpus, tmp_path, capsys):
    """Before any job; what is swept may not differ even where the table leaves it free."""
    name = tmp_path / "sweep"
    sweep = ["train", "-m", *tiny.command(corpus, name)[1:], "train.steps=1"]
    assert main([*sweep, "train.precision=fp32,bf16"]) == 0
    before = {file: (name / file).read_bytes() for file in tiny.files(name)}
    capsys.readouterr()
    for other, key in (("bf16,fp32", "train.precision=fp32"), ("fp32,bf16 optim.lr=0.5", "optim.lr=0.001")):
        assert main([*sweep, *f"train.precision={other}".split()]) == 2
        err = capsys.readouterr().err
        assert [part for part in ("job 0 (", key, "run.name") if part not in err] == [], err
    assert {file: (name / file).read_bytes() for file in tiny.files(name)} == before
    assert main([*sweep, "train.precision=fp32,bf16,fp64", "train.steps=2"]) == 0  # one job more, a step more
    assert [len(tiny.steps(name / f"job{num}")) for num in (0, 1, 2)] == [2, 2, 2]


@pytest.mark.real
def test_a_comparison_repeated_with_other_arms_is_refused(corpus, tmp_path, capsys):
    """A finished run is taken for its arm only where the arm is what it was."""
    name = tmp_path / "compared"
    line = [*tiny.command(corpus, name), "train.steps=1", "compare.seeds=[0]"]
    assert main([*line, "compare.arms.a=['optim.lr=0.002']", "compare.arms.b=['train.precision=fp32']"]) == 0
    capsys.readouterr()
    assert main([*line, "compare.arms.a=['optim.lr=0.5']", "compare.arms.b=['train.precision=fp32']"]) == 2
    err = capsys.readouterr().err
    assert f"{name}/a/seed_0 has optim.lr=0.002, and now optim.lr=0.5" in err
    assert main([*line, "compare.arms.a=['optim.lr=0.002']", "compare.arms.b=['train.precision=bf16']"]) == 2
    assert f"{name}/b/seed_0 has train.precision=fp32" in capsys.readouterr().err
