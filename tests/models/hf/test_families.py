"""Hugging Face folders through ``moetrain convert`` and ``export``: the same function and the same bits.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hf_cases import (
    CASES,
    SHARD,
    assert_same_tensors,
    convert,
    export,
    gradients_of,
    load_ours,
    load_theirs,
    write_theirs,
)
from hf_family import VOCAB
from torch import Tensor

from moetrain.models import Decoder, cross_entropy_sum
from moetrain.models.hf import ModelSpec, family_of
from moetrain.models.hf.pieces import by_theirs, joined

BATCH, SEQ = 3, 113
LENGTHS = (SEQ, 7, 103)  # of the padded rows


@dataclass(frozen=True)
class Moved:
    """A model on its way: transformers' own, its folder, the converted one, the exported one."""

    theirs: Any
    source: Path
    converted: Path
    exported: Path
    spec: ModelSpec
    ours: Decoder


# The same rule as in a case of a neighbouring family.
REPEATS = {
    "deepseek_v2", "deepseek_v2_groups", "deepseek_v3", "dots1", "dots1_window", "ernie4_5_moe_yarn",
    "gemma3_text_plain", "qwen3_5_text",
    "glm4_moe_groups", "glm4_moe_yarn", "gpt_oss_plain", "granitemoe", "hunyuan_v1_moe_alpha",
    "llama_biased", "llama_llama3", "mixtral_window", "moonlight", "olmoe_tied", "qwen2_moe_mixed",
    "qwen2_tied", "qwen2_yarn", "qwen3_moe_window", "qwen3_next_mixed", "qwen3_tied",
}  # fmt: skip
assert set(CASES) >= REPEATS


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in REPEATS)) for name in CASES],
)
def moved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Moved:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = CASES[request.param].their_model(torch.float32)
    source = write_theirs(theirs, folder / "source", SHARD)
    assert len(list(source.glob("*.safetensors"))) > 5
    converted = convert(source, folder / "converted")
    exported = export(converted, folder / "exported")
    return Moved(theirs, source, converted, exported, *load_ours(converted))


def batch() -> tuple[Tensor, Tensor]:
    """(ids, mask of what is no padding), [B, S]."""
    ids_BS = torch.randint(VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(5))
    return ids_BS, torch.arange(SEQ) < torch.tensor(LENGTHS)[:, None]


@torch.no_grad()
def test_the_logits_are_theirs(moved: Moved) -> None:
    """A padded batch of long rows; theirs is told by a mask, ours is not, or by documents."""
    ids_BS, real_BS = batch()
    expected_BSV = moved.theirs(ids_BS, attention_mask=real_BS.long()).logits[real_BS]
    scale = expected_BSV.abs().max().item()
    assert scale > 1
    for doc_ids_BS in (None, real_BS.long()):
        found_BSV = moved.ours.logits(moved.ours(ids_BS, doc_ids_BS=doc_ids_BS).hidden_BSD)[real_BS]
        torch.testing.assert_close(found_BSV, expected_BSV, rtol=0, atol=1e-5 * scale)


def test_the_gradients_are_theirs(moved: Moved, tmp_path: Path) -> None:
    """Of the loss of a padded batch, each by the name that it has in their checkpoint."""
    ids_BS, real_BS = batch()
    labels_BS = ids_BS.where(real_BS, -100)
    moved.theirs.zero_grad()
    moved.theirs(ids_BS, attention_mask=real_BS.long(), labels=labels_BS).loss.backward()
    expected = gradients_of(moved.theirs, tmp_path)
    moved.ours.zero_grad()
    hidden_BSD = moved.ours(ids_BS).hidden_BSD
    total, count = cross_entropy_sum(hidden_BSD[:, :-1], moved.ours.head_weight, labels_BS[:, 1:])
    (total / count).backward()
    table = family_of(json.loads((moved.source / "config.json").read_text()), "").table(moved.spec)
    parameters = dict(moved.ours.named_parameters())
    found = {
        name: joined(parts, lambda ours: parameters[ours].grad)
        for name, parts in by_theirs(table).items()
        if parts[0][0] in parameters  # a bias of the choice is none
    }
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert scale > 0 or ".experts." in name, name
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-4 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


@torch.no_grad()
def test_the_export_is_their_model_again(moved: Moved) -> None:
    ids_BS, _ = batch()
    again = load_theirs(moved.exported)
    assert type(again) is type(moved.theirs)
    torch.testing.assert_close(again(ids_BS).logits, moved.theirs(ids_BS).logits, rtol=0, atol=1e-5)


def test_there_and_back_is_the_same_to_the_bit(moved: Moved) -> None:
    """fp32, from shards into one file."""
    assert_same_tensors(moved.source, moved.exported)
    assert [file.name for file in moved.exported.glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.real
def test_bf16_is_the_same_to_the_bit(moved: Moved, tmp_path: Path) -> None:
    """From one file into shards."""
    theirs = copy.deepcopy(moved.theirs).to(torch.bfloat16)
    source = write_theirs(theirs, tmp_path / "source")
    back = export(convert(source, tmp_path / "ours"), tmp_path / "back", "max_shard_gb=8e-6")
    assert len(list(back.glob("*.safetensors"))) > 3
    assert_same_tensors(source, back)
    assert load_theirs(back).dtype is torch.bfloat16


def test_one_file_and_shards_become_the_same_folder(tmp_path: Path) -> None:
    theirs = CASES["qwen2_moe_mixed"].their_model(torch.bfloat16)
    one, several = (
        convert(write_theirs(theirs, tmp_path / f"source_{shard}", shard), tmp_path / f"ours_{shard}")
        for shard in (None, SHARD)
    )
    hashes = [
        json.loads((tiny.checkpoint(folder, 0) / "extra.json").read_text()) for folder in (one, several)
    ]
    assert hashes[0]["tensors"] == hashes[1]["tensors"]
    assert hashes[0]["origin"]["tensors"] == hashes[1]["origin"]["tensors"]
