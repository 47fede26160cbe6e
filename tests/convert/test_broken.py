"""Broken, unsupported or unwritable: one line that names it, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import CASES, refused, sources, tensors_of, write_theirs, write_tokenizer
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
Q0, EXPERT = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.block_sparse_moe.experts.3.w2.weight"
__all__ = ["sources"]  # a fixture
Edit = Callable[[Path], None]


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def edit_tensors(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def config(**values: Any) -> Edit:
    return lambda folder: edit_json(folder / "config.json", **values)


def tensors(edit: Callable[[dict[str, Any]], Any]) -> Edit:
    return lambda folder: edit_tensors(folder / "model.safetensors", edit)


def without(key: str) -> Edit:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        del values[key]
        (folder / "config.json").write_text(json.dumps(values))

    return edit


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def listed(name: str, place: str | None) -> Edit:
    """The index says that ``name`` is in ``place``, or does not know it."""

    def edit(folder: Path) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        weight_map[name] = place
        edit_json(folder / INDEX, weight_map={n: f for n, f in weight_map.items() if f is not None})

    return edit


def twice(folder: Path) -> None:
    """A tensor in a second shard too, of which the index knows."""
    here = shard_of(folder, Q0)
    other = next(file for file in sorted(folder.glob("model-*.safetensors")) if file != here)
    edit_tensors(other, lambda found: found.update({Q0: load_file(here)[Q0]}))


def pickled(folder: Path) -> None:
    torch.save(tensors_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def mixed(found: dict[str, Any]) -> None:
    found[EXPERT] = found[EXPERT].half()


CONVERT: dict[str, tuple[str, Edit, list[str]]] = {
    "a shard is missing": (
        "sharded",
        lambda folder: shard_of(folder, Q0).unlink(),
        [INDEX, "but 1 of its"],
    ),
    "an extra tensor": (
        "single",
        tensors(lambda found: found.update({"model.extra": torch.ones(2)})),
        ["model.extra has no place"],
    ),
    "a tensor is lacking": ("single", tensors(lambda found: found.pop(EXPERT)), [f"{EXPERT} is missing"]),
    "a wrong shape": (
        "single",
        tensors(lambda found: found.update({EXPERT: torch.ones(37, 31)})),
        [f"{EXPERT} is [37, 31], not [31, 37]"],
    ),
    "a truncated file": ("single", truncated, ["model.safetensors is no intact safetensors file"]),
    "the index names another file": (
        "sharded",
        listed(Q0, "model-00099-of-00099.safetensors"),
        ["names model-00099-of-00099.safetensors"],
    ),
    "the index names a file elsewhere": ("sharded", listed(Q0, "../x.safetensors"), ["not a file beside it"]),
    "the index lists a tensor elsewhere": (
        "sharded",
        lambda folder: listed(Q0, shard_of(folder, EXPERT).name)(folder),
        [f"{Q0} is ", f"does not hold what {INDEX} says"],
    ),
    "the index does not list a tensor": (
        "sharded",
        listed(Q0, None),
        [f"{Q0} is in the file but not listed"],
    ),
    "the index is no index": (
        "sharded",
        lambda folder: edit_json(folder / INDEX, weight_map=[1]),
        ["has no weight_map"],
    ),
    "a tensor is in two shards": ("sharded", twice, [f"{Q0} is in"]),
    "a pickle": ("single", pickled, ["pytorch_model.bin", "can run code"]),
    "no weights": (
        "single",
        lambda folder: (folder / "model.safetensors").unlink(),
        ["holds no model.safetensors"],
    ),
    "weights of another name": (
        "single",
        lambda folder: shutil.move(folder / "model.safetensors", folder / "x.safetensors"),
        ["holds x.safetensors", INDEX],
    ),
    "no config.json": ("single", lambda folder: (folder / "config.json").unlink(), ["there is no"]),
    "config.json is no JSON": (
        "single",
        lambda folder: (folder / "config.json").write_text("{'model_type'"),
        ["cannot read", "config.json"],
    ),
    "config.json is a list": (
        "single",
        lambda folder: (folder / "config.json").write_text("[]"),
        ["not a JSON object"],
    ),
    "an unknown model_type": (
        "single",
        config(model_type="gpt_neox"),
        ["model_type='gpt_neox' is not known", "mixtral"],
    ),
    "another head": (
        "single",
        config(architectures=["MixtralForSequenceClassification"]),
        ["MixtralForSequenceClassification"],
    ),
    "a key is missing": ("single", without("num_local_experts"), ["num_local_experts is missing"]),
    "a key is no number": ("single", config(hidden_size="31"), ["hidden_size is '31', not a whole number"]),
    "an unsupported activation": ("single", config(hidden_act="relu6"), ["hidden_act='relu6'"]),
    "quantised weights": ("single", config(quantization_config={"bits": 4}), ["quantization_config="]),
    "heads that do not divide": ("single", config(num_key_value_heads=4), ["num_kv_heads=4", "num_heads=6"]),
    "more chosen experts than there are": ("single", config(num_experts_per_tok=9), ["top_k=9", "7"]),
    "no layer": ("single", config(num_hidden_layers=0), ["num_layers=0"]),
    "biases of attention": ("tied", config(attention_bias=True), ["self_attn.q_proj.bias is missing"]),
    "a tokenizer of more tokens": (
        "single",
        lambda folder: write_tokenizer(folder, 101),
        ["101 tokens", "only 97"],
    ),
    "no tokenizer": (
        "single",
        lambda folder: (folder / "tokenizer.json").unlink(),
        ["unknown tokenizer", "tokenizer.json"],
    ),
    "a tied head that is another": (
        "tied",
        tensors(lambda found: found.update({"lm_head.weight": torch.ones(97, 66)})),
        ["tie_word_embeddings", "lm_head.weight differs"],
    ),
    "several dtypes in one of ours": ("single", tensors(mixed), ["w_down_EFD", "['float16', 'float32']"]),
    "a dtype that nobody trains": (
        "single",
        tensors(lambda found: found.update({Q0: found[Q0].to(torch.int8)})),
        [f"{Q0} is I8"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", list(CONVERT))
def test_a_source_that_cannot_be_read(
    what: str, sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, edit, words = CONVERT[what]
    source = tmp_path / "source"
    shutil.copytree(sources[name], source)
    edit(source)
    line = refused(capsys, "convert", f"source={source}", f"target={tmp_path}/out/deep/new")
    assert [word for word in words if word not in line] == [], line
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
        ("olmoe", {"attention_bias": True}, "attention_bias=True"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
         "max_window_layers=1"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types names"),
        ("qwen3_moe_mixed", {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        ("qwen3_moe_mixed", {"mlp_only_layers": [2], "decoder_sparse_step": 1}, "mlp_only_layers=[2]"),
        ("qwen2_moe", {"use_sliding_window": True, "layer_types": None}, "use_sliding_window"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_supported(
    name: str, values: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_theirs(CASES[name].their_model(torch.float32), tmp_path / "source")
    config(**values)(source)
    assert words in refused(capsys, "convert", f"source={source}", f"target={tmp_path}/new")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file.bin").write_text("")
    for source, words in (("nowhere", "does not exist"), ("file.bin", "give a folder"), (".", "there is no")):
        line = refused(capsys, "convert", f"source={tmp_path / source}", f"target={tmp_path}/new")
        assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]
