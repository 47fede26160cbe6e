"""Targets, exports and first weights that cannot be: one line, and nothing left behind."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from hf_cases import convert, export, refused, sources, write_tokenizer

from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.format import decode_metadata
from moetrain.checkpoint.read import load_checkpoint
from moetrain.cli import main
from moetrain.config.stored import read_spec
from moetrain.models.hf import FAMILIES
from moetrain.models.hf.source import SafetensorsFolder

__all__ = ["sources"]  # a fixture


def test_a_target_that_exists_or_cannot_be(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    for target, words in (
        ("there", "exists already"),
        ("file", "exists already"),
        ("file/new", "Not a directory"),
    ):
        assert words in refused(capsys, "convert", f"source={sources['tied']}", f"target={tmp_path / target}")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["file", "there"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], capture_output=True
        )
    except OSError as error:
        pytest.skip(f"cannot mount a small tmpfs here: {error}")
    if made.returncode:
        pytest.skip("cannot mount a small tmpfs here (needs root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(
    sources: dict[str, Path], small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "convert", f"source={sources['single']}", f"target={small_disk}/new")
    assert "No space left on device" in line
    assert list(small_disk.iterdir()) == []
    ours = convert(sources["single"], tmp_path / "ours")
    line = refused(capsys, "export", f"checkpoint={ours}", f"target={small_disk}/new")
    assert "No space left on device" in line
    assert list(small_disk.iterdir()) == []


def test_ctrl_c_in_the_middle(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = convert(sources["single"], tmp_path / "ours")
    left = [path.name for path in tmp_path.iterdir()]
    read, calls = SafetensorsFolder.read, []

    def interrupted(self: SafetensorsFolder, name: str, *part: object) -> torch.Tensor:
        calls.append(name)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return read(self, name, *part)

    monkeypatch.setattr(SafetensorsFolder, "read", interrupted)
    assert main(["convert", f"source={sources['single']}", f"target={tmp_path}/new"]) == 130
    assert len(calls) == 40
    assert [path.name for path in tmp_path.iterdir()] == left
    counted = iter(range(12))

    def stop(tensor: torch.Tensor) -> memoryview:
        if next(counted) == 11:
            raise KeyboardInterrupt
        return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())

    monkeypatch.setattr("moetrain.models.hf.shards.bytes_of", stop)
    assert main(["export", f"checkpoint={ours}", f"target={tmp_path}/new"]) == 130
    assert next(counted, None) is None
    assert [path.name for path in tmp_path.iterdir()] == left


def bump_bias(run: Path) -> None:
    """A second checkpoint, whose first router has a bias, as aux-loss-free balancing gives it one."""
    path = tiny.checkpoint(run, 0)
    described = decode_metadata((path / "metadata.json").read_text()).state_dict_metadata
    tensors = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in described.items()}
    load_checkpoint(path, tensors)
    tensors["model.blocks.0.feed_forward.router.bias_E"][1] = 0.5
    Checkpointer(run / "checkpoints").save(1, tensors, {"step": 1})


def test_an_export_that_cannot_be(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = convert(sources["single"], tmp_path / "ours")

    def line(*more: str) -> str:
        found = refused(capsys, "export", f"checkpoint={ours}", f"target={tmp_path}/new", *more)
        assert [path.name for path in tmp_path.iterdir()] == ["ours"]
        return found

    assert "family=gpt2 is not known: auto, " in line("family=gpt2")
    said = line("family=qwen3_moe")
    assert "family=qwen3_moe cannot express this model: model.qk_norm=none, and it has only head" in said
    assert said.endswith("mixtral would")
    assert "max_shard_gb=0" in line("max_shard_gb=0")
    bump_bias(ours)
    assert "blocks.0.feed_forward.router.bias_E is not zero, and mixtral has no such tensor" in line()
    for path in (ours / "checkpoints").glob("step_*"):
        file = max(path.glob("*.distcp"), key=lambda found: found.stat().st_size)
        file.write_bytes(file.read_bytes()[:-7] + b"damaged")
    assert "all 2 checkpoint(s)" in line()
    assert "there is no checkpoint at" in refused(
        capsys, "export", f"checkpoint={tmp_path}/nowhere", f"target={tmp_path}/new"
    )


def test_a_model_that_no_family_expresses(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny run routes by sigmoids: every family says why it cannot."""
    line = refused(capsys, "export", f"checkpoint={trained}", f"target={tmp_path}/new")
    assert "no family expresses this model exactly" in line
    assert "mixtral: router.score=sigmoid" in line
    assert all(f"{name}: " in line for name in FAMILIES)


def test_another_tokenizer_is_the_one_that_is_exported(sources: dict[str, Path], tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "other", 7)
    ours = convert(sources["tied"], tmp_path / "ours", f"tokenizer={tmp_path}/other")
    assert (ours / "hf" / "config.json").is_file()
    assert not (ours / "hf" / "tokenizer.json").exists()
    words = json.loads((export(ours, tmp_path / "out") / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(words) == 7


def test_first_weights_that_cannot_be(
    sources: dict[str, Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], training: None
) -> None:
    write_tokenizer(tmp_path / "other", 13)
    (tmp_path / "neither").mkdir()
    (tmp_path / "model.gguf").write_text("")
    single = f"init_from={sources['single']}"
    other = ["data.tokenizer.kind=file", f"data.tokenizer.path={tmp_path}/other"]
    cases = {
        "does not exist": [f"init_from={tmp_path}/nowhere"],
        "holds neither config.yaml (a run folder) nor config.json": [f"init_from={tmp_path}/neither"],
        "moetrain convert it first": [f"init_from={tmp_path}/model.gguf"],
        "data.tokenizer is another one (13 tokens)": [single, *other],
        "is of another model or optimizer": [single, "model.num_layers=2"],
        "model.embed_VD is": [single, "model.vocab_size=101"],
        "model.blocks.": [single, "model=tiny"],
    }
    data = [f"data.path={corpus}/text", f"data.cache_dir={tmp_path}/cache", "data=local", "data.seq_len=16"]
    for words, more in cases.items():
        run = tmp_path / "run"
        line = refused(capsys, "train", f"run.dir={run}", *data, "train.steps=1", *more)
        assert words in line
        assert not (run / "config.yaml").exists()


def test_first_weights_are_in_the_printed_config_and_not_swept(
    sources: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    single = f"init_from={sources['single']}"
    width = read_spec(sources["single"]).model.d_model
    assert main(["train", single, "train.steps=3", "--cfg", "job"]) == 0
    assert f"d_model: {width}\n" in capfd.readouterr().out
    assert main(["train", "-m", f"{single},{sources['tied']}", f"run.dir={tmp_path}/run"]) == 2
    assert "init_from decides the model and cannot be swept" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
