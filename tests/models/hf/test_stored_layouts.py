"""Other layouts of the same tensors: stacked experts, a decoder without its head, a tied head alone.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import (
    CASES,
    SHARD,
    assert_same_tensors,
    convert,
    export,
    load_ours,
    load_theirs,
    refused,
    sources,
    tensors_of,
    write_theirs,
    write_tokenizer,
)
from hf_family import VOCAB, transformers
from safetensors.torch import save_file
from torch import Tensor

from moetrain.config.stored import trained_config
from moetrain.convert.open_model import open_model
from moetrain.errors import UserError
from moetrain.models.hf.source import SafetensorsFolder, open_source
from moetrain.models.hf.tensors import Part

Tensors = dict[str, Tensor]
__all__ = ["sources"]  # a fixture


def write_stacked(model: Any, folder: Path) -> Path:
    """In transformers 5's own layout, in shards."""
    model.save_pretrained(folder, save_original_format=False, max_shard_size=SHARD)
    write_tokenizer(folder)
    return folder


def rewrite(source: Path, target: Path, change: Any) -> Path:
    """A copy of ``source`` in one file, whose tensors are ``change`` of its own."""
    shutil.copytree(source, target)
    tensors = change(tensors_of(source))
    for file in target.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def ids() -> Tensor:
    return torch.randint(VOCAB, (2, 60), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        *("mixtral", "qwen2_moe_mixed", "qwen3_moe_mixed", "olmoe", "qwen3_5_moe_text"),
        *("minimax_m2", "ernie4_5_moe", "granitemoeshared"),  # with names of their own there
    ],
)
def test_stacked_experts_are_the_same_model(name: str, tmp_path: Path) -> None:
    """The function of transformers' model, and the very tensors that the other layout gives."""
    theirs = CASES[name].their_model(torch.float32)
    stacked = write_stacked(theirs, tmp_path / "stacked")
    assert any(tensor.ndim == 3 for tensor in tensors_of(stacked).values())
    _, ours = load_ours(convert(stacked, tmp_path / "ours"))
    expected_BSV = theirs(ids()).logits
    found_BSV = ours.logits(ours(ids()).hidden_BSD)
    scale = expected_BSV.abs().max().item()
    torch.testing.assert_close(found_BSV, expected_BSV, rtol=0, atol=1e-5 * scale)
    out = export(tmp_path / "ours", tmp_path / "out")
    assert_same_tensors(write_theirs(theirs, tmp_path / "plain"), out)


def test_no_stack_is_read_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each expert's matrices alone: a stack is the largest that a model has."""
    folder = write_stacked(CASES["qwen3_moe"].their_model(torch.float32), tmp_path / "stacked")
    stacks = {name for name, tensor in tensors_of(folder).items() if tensor.ndim == 3}
    read, seen = SafetensorsFolder.read, []

    def noting(self: SafetensorsFolder, name: str, part: Part | None = None) -> Tensor:
        tensor = read(self, name, part)
        seen.append((name, part is None, tensor.ndim))
        return tensor

    monkeypatch.setattr(SafetensorsFolder, "read", noting)
    opened = open_source(SafetensorsFolder(folder))
    for name in opened.table:
        opened.read(name)
    assert {name for name, _, _ in seen} >= stacks
    assert [name for name, whole, ndim in seen if name in stacks and (whole or ndim != 2)] == []


STACKS: dict[str, tuple[Any, str]] = {
    "an expert is lacking": (
        lambda name, t: t[:-1] if name.endswith("gate_up_proj") else t,
        "gate_up_proj is [6, 74, 31], and the experts of its config.json want [7, 74, 31]",
    ),
    "a stack is transposed": (
        lambda name, t: t.mT.contiguous() if name.endswith(".down_proj") else t,
        "down_proj is [7, 37, 31], and the experts of its config.json want [7, 31, 37]",
    ),
}


@pytest.mark.parametrize("what", list(STACKS))
def test_a_stack_of_another_shape(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = STACKS[what]
    stacked = write_stacked(CASES["mixtral"].their_model(torch.float32), tmp_path / "stacked")
    other = rewrite(
        stacked, tmp_path / "other", lambda found: {name: change(name, t) for name, t in found.items()}
    )
    (other / "model.safetensors.index.json").unlink()
    assert words in refused(capsys, "convert", f"source={other}", f"target={tmp_path}/new")


@torch.no_grad()
@pytest.mark.parametrize("layout", ["head alone", "no head, bare names", "rotary tables"])
def test_a_tied_model_in_other_words(layout: str, tmp_path: Path) -> None:
    theirs = CASES["llama_tied"].their_model(torch.float32)
    source = write_theirs(theirs, tmp_path / "source")

    def change(found: Tensors) -> Tensors:
        if layout == "head alone":
            found["lm_head.weight"] = found.pop("model.embed_tokens.weight")
        if layout == "no head, bare names":
            found = {name.removeprefix("model."): tensor for name, tensor in found.items()}
        if layout == "rotary tables":
            for place in ("model.", "model.layers.0.self_attn."):
                found[f"{place}rotary_emb.inv_freq"] = torch.ones(7)
        return found

    folder = rewrite(source, tmp_path / "other", change)
    if layout == "no head, bare names":
        theirs.model.save_pretrained(tmp_path / "bare")
        assert tensors_of(tmp_path / "bare").keys() == tensors_of(folder).keys()
        shutil.copy(tmp_path / "bare" / "config.json", folder)  # whose architecture is the bare decoder
    if layout != "head alone":
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(loaded(ids()).logits, theirs(ids()).logits, rtol=0, atol=1e-5)
    ours = open_model(folder, trained_config).build()
    found_BSV = ours.logits(ours(ids()).hidden_BSD)
    torch.testing.assert_close(found_BSV, theirs(ids()).logits, rtol=0, atol=1e-5)


def test_an_untied_model_needs_its_head(tmp_path: Path) -> None:
    theirs = CASES["llama"].their_model(torch.float32)
    theirs.model.save_pretrained(tmp_path / "bare")
    write_tokenizer(tmp_path / "bare")
    with pytest.raises(UserError, match=r"lm_head\.weight is missing"):
        open_model(tmp_path / "bare", trained_config)


def test_shards_in_folders(sources: dict[str, Path], tmp_path: Path) -> None:
    """As transformers joins the names; what lies beside and is not listed is not read."""
    folder = tmp_path / "moved"
    shutil.copytree(sources["sharded"], folder)
    (folder / "weights").mkdir()
    for file in folder.glob("*.safetensors"):
        file.rename(folder / "weights" / file.name)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-', '"weights/model-'))
    shutil.copy(sources["tied"] / "model.safetensors", folder / "consolidated.safetensors")
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    ours = convert(folder, tmp_path / "ours")
    assert_same_tensors(sources["sharded"], export(ours, tmp_path / "out"))


def test_an_index_beside_a_lone_file(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers reads the lone file; an index that lists just this one is no contradiction."""
    folder = tmp_path / "both"
    shutil.copytree(sources["sharded"], folder)
    shutil.copy(sources["single"] / "model.safetensors", folder)
    line = refused(capsys, "convert", f"source={folder}", f"target={tmp_path}/new")
    assert "holds model.safetensors and model.safetensors.index.json, which lists other files" in line
    names = ", ".join(f'"{name}": "model.safetensors"' for name in tensors_of(sources["single"]))
    for file in folder.glob("model-*.safetensors"):
        file.unlink()
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{names}}}}}')
    convert(folder, tmp_path / "ours")


@pytest.mark.parametrize("layers", [0, 1])
def test_layers_that_predict_further_tokens(
    layers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Left out with a word, where the config says that there are some; else they have no place."""
    source = write_theirs(CASES["glm4_moe"].their_model(torch.float32), tmp_path / "source")
    further = {
        "model.layers.3.eh_proj.weight": torch.ones(31, 62),
        "model.layers.3.enorm.weight": torch.ones(31),
    }
    folder = rewrite(source, tmp_path / "further", lambda found: found | further)
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    if not layers:
        line = refused(capsys, "convert", f"source={folder}", f"target={tmp_path}/new")
        assert "model.layers.3.eh_proj.weight has no place in this model" in line
        return
    ours = convert(folder, tmp_path / "ours")
    assert "2 tensor(s) of layers that predict further tokens" in capsys.readouterr().err
    out = export(ours, tmp_path / "out")
    assert_same_tensors(source, out)
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_the_bias_of_a_choice_stays_in_fp32(tmp_path: Path) -> None:
    """Whatever dtype an export is asked for: transformers keeps it so, and halves would choose others."""
    source = write_theirs(CASES["glm4_moe"].their_model(torch.float32), tmp_path / "source")
    out = export(convert(source, tmp_path / "ours"), tmp_path / "out", "dtype=bf16")
    found, before = tensors_of(out), tensors_of(source)
    biases = [name for name in found if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    assert all(found[name].any() and torch.equal(found[name], before[name]) for name in biases)
    assert {t.dtype for name, t in found.items() if name not in biases} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    load_theirs(out)
