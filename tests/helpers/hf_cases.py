"""Small Hugging Face folders that transformers wrote, and the real commands between them and ours.

Importing it skips a test file where transformers is missing.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_families import FAMILIES
from hf_family import Family, transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from moetrain.checkpoint.read import load_checkpoint
from moetrain.checkpoint.state_dict import MODEL, model_tensors
from moetrain.cli import main
from moetrain.config.stored import read_spec
from moetrain.models import Decoder
from moetrain.models.hf import ModelSpec

SHARD = "15KB"  # a dozen shards or more of each tiny model
_TIED = {"tie_word_embeddings": True}
TIED = {
    f"{name}_tied": replace(
        family, theirs={**family.theirs, **_TIED}, ours={**family.ours, "tie_embeddings": True}
    )
    for name, family in FAMILIES.items()
    if name in ("qwen3", "mixtral", "qwen2_moe_mixed", "olmoe")
}
_WINDOW = {"use_sliding_window": True, "sliding_window": 5}
WINDOWED = {
    "qwen2_window": replace(
        FAMILIES["qwen2"], theirs={**FAMILIES["qwen2"].theirs, **_WINDOW, "max_window_layers": 0}
    ),
    "qwen3_moe_window": replace(FAMILIES["qwen3_moe"], theirs={**FAMILIES["qwen3_moe"].theirs, **_WINDOW}),
    "qwen2_moe_window": replace(
        FAMILIES["qwen2_moe"],
        theirs={**FAMILIES["qwen2_moe"].theirs, **_WINDOW, "layer_types": ["sliding_attention"] * 3},
    ),
}
CASES: dict[str, Family] = {**FAMILIES, **TIED, **WINDOWED}


def write_tokenizer(folder: Path, tokens: int = 11) -> None:
    """A tokenizer of a few words, as transformers keeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {f"w{number}": number for number in range(tokens - 1)} | {"<|endoftext|>": tokens - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_theirs(model: Any, folder: Path, shard: str | None = None) -> Path:
    """The folder of transformers' model, with a tokenizer; ``shard``: the largest size of a file."""
    model.save_pretrained(folder, max_shard_size=shard or "5GB")
    write_tokenizer(folder)
    return folder


def convert(source: Path, target: Path, *more: str) -> Path:
    assert main(["convert", f"source={source}", f"target={target}", *more]) == 0
    return target


def export(checkpoint: Path, target: Path, *more: str) -> Path:
    assert main(["export", f"checkpoint={checkpoint}", f"target={target}", *more]) == 0
    return target


def load_ours(folder: Path) -> tuple[ModelSpec, Decoder]:
    """The model of a converted folder or of a run."""
    spec = read_spec(folder)
    model = Decoder(spec.model, spec.router, spec.experts, spec.vocab_size)
    load_checkpoint(folder, model_tensors(model), MODEL, cast=True)
    return spec, model


def load_theirs(folder: Path) -> Any:
    """transformers' model of a folder. An AssertionError where a tensor is missing, too many or too large."""
    theirs, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        output_loading_info=True,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    complaints = {key: value for key, value in found.items() if value}
    assert not complaints, complaints
    return theirs


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors, by name."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same_tensors(one: Path, other: Path) -> None:
    """Names, dtypes and bits."""
    here, there = tensors_of(one), tensors_of(other)
    assert here.keys() == there.keys()
    different = [
        name
        for name, tensor in here.items()
        if tensor.dtype is not there[name].dtype or not torch.equal(tensor, there[name])
    ]
    assert not different


def gradients_of(model: Any, folder: Path) -> dict[str, Tensor]:
    """The gradients of transformers' model under its checkpoint's names: saved as if they were weights."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(folder, state_dict=gradients)
    return tensors_of(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name: a Mixtral in shards and in one file, and a tied Llama; nobody may change them."""
    folder = tmp_path_factory.mktemp("sources")
    mixtral = CASES["mixtral"].their_model(torch.float32)
    return {
        "sharded": write_theirs(mixtral, folder / "sharded", SHARD),
        "single": write_theirs(mixtral, folder / "single"),
        "tied": write_theirs(CASES["llama_tied"].their_model(torch.float32), folder / "tied"),
    }


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that ends with 2."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("moetrain: error: ")]
    assert len(lines) == 1, said
    assert "Traceback" not in said
    return lines[0]
