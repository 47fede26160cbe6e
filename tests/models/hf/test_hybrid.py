"""Qwen3-Next and Qwen3.5: text against theirs, keys of their config.json, tensors that are left out.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import CASES, assert_same_tensors, convert, export, load_ours, tensors_of, write_theirs
from hf_families import HYBRID
from hf_family import Family
from hf_hybrid import FULL, LINEAR, LINEAR_ALONE, wide
from safetensors.torch import save_file

from moetrain.errors import UserError
from moetrain.models import generate
from moetrain.models.attention_options import GatedDeltaConfig
from moetrain.models.hf.family import read_model
from moetrain.models.options import ModelConfig

QWEN3_NEXT, QWEN3_5_MOE = HYBRID["qwen3_next"], HYBRID["qwen3_5_moe_text"]


def test_cached_text_is_theirs() -> None:
    """Theirs keeps a state too: a prompt at once, then token by token."""
    theirs, ours = QWEN3_NEXT.build(torch.float64)
    prompt_BS = QWEN3_NEXT.batch()[0][:1, :5]
    with wide("Qwen3Next", torch.float64):
        text = theirs.generate(prompt_BS, max_new_tokens=13, do_sample=False)[0, 5:].tolist()
    assert len(set(text)) > 4
    assert generate(ours, prompt_BS[0].tolist(), 13, temperature=0) == text


@torch.no_grad()
def test_a_model_of_linear_layers_alone() -> None:
    """And rows padded on the left, where theirs takes zeros into the state and ours starts it anew."""
    family = Family(**LINEAR_ALONE)
    theirs, ours = family.build(torch.float64)
    ids_BS, real_BS = family.batch()[0], torch.arange(11) >= torch.tensor([[0], [4], [9]])
    with wide("Qwen3Next", torch.float64):
        expected_BSV = theirs(ids_BS, attention_mask=real_BS.long(), use_cache=False).logits
    found_BSV = ours.logits(ours(ids_BS, doc_ids_BS=real_BS.long()).hidden_BSD)
    torch.testing.assert_close(found_BSV[real_BS], expected_BSV[real_BS], rtol=1e-10, atol=1e-10)


SIZES = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4, "head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 24, "intermediate_size": 48,
}  # fmt: skip


def model(name: str, **values: Any) -> ModelConfig:
    return read_model({"model_type": name, **SIZES, **values}, "config.json")[1].model


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe_text"])
def test_layer_types_in_every_spelling(name: str) -> None:
    """None: every fourth is full. The shortest pattern is taken, so that equal models are equal configs."""
    delta, own = "gated_delta", "grouped_query"
    four = model(name)
    assert four.attention_pattern == (delta, delta, delta, own)
    assert four == model(name, layer_types=[LINEAR, LINEAR, LINEAR, FULL] * 2)
    assert four == model(name, layer_types=None, full_attention_interval=4)
    assert model(name, full_attention_interval=2).attention_pattern == (delta, own)
    odd = [FULL, LINEAR, FULL, FULL, LINEAR, LINEAR, FULL, LINEAR]
    theirs = {LINEAR: delta, FULL: own}
    assert model(name, layer_types=odd).attention_pattern == tuple(theirs[kind] for kind in odd[:6])
    full = model(name, layer_types=[FULL] * 8)
    assert (full.attention_pattern, full.attention_gate, full.gated_delta) == ((), True, GatedDeltaConfig())
    linear = model(name, layer_types=[LINEAR] * 8)
    assert (linear.attention_pattern, linear.attention_gate) == ((delta,), False)


def test_keys_that_change_nothing_and_parts_of_a_head() -> None:
    name = "qwen3_5_moe_text"
    images = {"rope_type": "default", "mrope_section": [1, 1, 0], "mrope_interleaved": True}
    assert model(name) == model(
        name, attn_output_gate=True, mamba_ssm_dtype="float32", mtp_num_hidden_layers=1,
        mtp_use_dedicated_embeddings=False, rope_parameters=images,
    )  # fmt: skip
    assert model(name).rope_fraction == 0.25
    assert model(name, partial_rotary_factor=0.5).rope_fraction == 0.5
    assert model(name, rope_parameters={"partial_rotary_factor": 0.5}).rope_fraction == 0.5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"layer_types": ["sliding_attention"] * 8}, "layer_types names 'sliding_attention': only"),
        ({"layer_types": [FULL]}, "layer_types names 1 layers of 8"),
        ({"layer_types": 7}, "layer_types is 7"),
        ({"full_attention_interval": 0}, "full_attention_interval=0 must be 1 or more"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"attn_output_gate": False}, "attn_output_gate=False is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"linear_num_key_heads": 0}, "num_key_heads=0 must be 1 or more"),
        ({"linear_key_head_dim": None}, "linear_key_head_dim is None"),
        ({"partial_rotary_factor": 0.2}, "rope_fraction=0.2 of model.head_dim=16"),
    ],
)
def test_a_config_that_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as raised:
        model("qwen3_next", **values)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "family", [QWEN3_NEXT, pytest.param(QWEN3_5_MOE, marks=pytest.mark.real)], ids=["next", "3_5"]
)
def test_a_layer_that_predicts_further_is_left_out(
    family: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_theirs(family.their_model(torch.float32), tmp_path / "source")
    further = {"mtp.fc.weight": torch.ones(31, 62), "mtp.layers.0.mlp.gate.weight": torch.ones(11, 31)}
    tensors = tensors_of(source)
    save_file(tensors | further, source / "model.safetensors", {"format": "pt"})
    ours = convert(source, tmp_path / "ours")
    assert "2 tensor(s) of layers that predict further tokens (mtp.fc.weight" in capsys.readouterr().err
    assert tensors_of(export(ours, tmp_path / "out")).keys() == tensors.keys()


@pytest.mark.real
def test_a_trained_model_goes_out_as_the_other_family(tmp_path: Path) -> None:
    """Both have words for it; matrices that one stores in one the other stores apart, bit for bit."""
    source = write_theirs(CASES["qwen3_next"].their_model(torch.float32), tmp_path / "source")
    one = convert(source, tmp_path / "one")
    other = export(one, tmp_path / "other", "family=qwen3_5_moe_text")
    assert any(name.endswith("in_proj_z.weight") for name in tensors_of(other))
    back = export(convert(other, tmp_path / "two"), tmp_path / "back", "family=qwen3_next")
    assert_same_tensors(source, back)
    specs = [load_ours(folder)[0].model for folder in (one, tmp_path / "two")]
    assert len({replace(spec, d_ff=1) for spec in specs}) == 1  # of layers that there are none
