"""``init_from`` of models whose files hold layers that predict further tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from further_cases import write
from hf_cases import convert, export, refused, tensors_of

from moetrain.cli import main

pytestmark = [pytest.mark.usefixtures("training"), pytest.mark.real]

STEPS = [
    *("data=local", "data.seq_len=8", "train.steps=2", "train.micro_batch_size=2", "train.threads=1"),
    *("train.global_batch_tokens=32", "train.eval_samples=2", "train.sample_tokens=0", "optim.lr=0.01"),
    *("schedule.warmup_steps=0", "balance=none"),
    "data.cross_document_attention=true",  # to their tokenizer a whole text is one unknown word
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of one model: Hugging Face's folder, and the converted one."""
    folder = tmp_path_factory.mktemp("further")
    source = write("glm4_moe", folder / "source").folder
    return {"folder": source, "converted": convert(source, folder / "ours")}


def train(start: Path, corpus: Path, run: Path, *more: str) -> list[str]:
    data = [f"data.path={corpus}/text", f"data.cache_dir={corpus}/cache"]
    return ["train", f"init_from={start}", f"run.dir={run}", *data, *STEPS, *more]


@pytest.mark.parametrize("kind", ["folder", "converted"])
def test_they_are_trained_by_option_alone(kind, folders, corpus, tmp_path, capsys):
    start, run, trained = folders[kind], tmp_path / "run", tmp_path / "trained"
    assert main(train(start, corpus, run)) == 0
    said = capsys.readouterr().err
    assert "left out of" in said
    assert "model.future.layers=1 would take them" in said
    assert "train/loss_future_1" not in tiny.steps(run)[0]
    assert not [name for name in tensors_of(export(run, tmp_path / "without")) if "layers.3." in name]

    assert main(train(start, corpus, trained, "model.future.layers=1")) == 0
    assert "left out of" not in capsys.readouterr().err
    rows = tiny.steps(trained)
    assert all(0 < row["train/loss_future_1"] < 10 for row in rows)
    assert "moe/3/entropy" in rows[0]
    back, before = tensors_of(export(trained, tmp_path / "back")), tensors_of(folders["folder"])
    assert back.keys() == before.keys()
    changed = {name for name, tensor in back.items() if not torch.equal(tensor, before[name])}
    assert {f"model.layers.3.{name}.weight" for name in ("eh_proj", "enorm", "mlp.gate")} <= changed
    for copy, own in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        assert torch.equal(back[f"model.layers.3.{copy}.weight"], back[f"{own}.weight"])


def test_more_of_them_than_there_are(folders, corpus, tmp_path, capsys):
    arguments = train(folders["converted"], corpus, tmp_path / "run", "model.future.layers=2")
    assert "blocks.4." in refused(capsys, *arguments)
