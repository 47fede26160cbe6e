"""Files of models that read images, too: the language model alone, against transformers' whole model on text.

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
    assert_same_tensors,
    convert,
    export,
    load_theirs,
    refused,
    tensors_of,
    write_tokenizer,
)
from hf_family import SHAPE, VOCAB, transformers
from hf_hybrid import slow_decay
from safetensors.torch import save_file
from torch import Tensor

from moetrain.config.stored import trained_config
from moetrain.convert.open_model import open_model
from moetrain.errors import UserError
from moetrain.models.hf.text_part import OUTERS, text_config

_QWEN_EYE = {"depth": 1, "num_heads": 2, "out_hidden_size": 31, "num_position_embeddings": 16}
EYES = {  # sizes of what reads images
    "gemma3": {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    "qwen3_5_moe": _QWEN_EYE,
    "qwen3_5": _QWEN_EYE,
}
CLASSES = {"gemma3": "Gemma3", "qwen3_5_moe": "Qwen3_5Moe", "qwen3_5": "Qwen3_5"}


def whole_config(name: str) -> Any:
    family = CASES[OUTERS[name].text]
    tied = family.theirs.get("tie_word_embeddings", False)
    text = {"tie_word_embeddings": tied, "initializer_range": 0.2, **SHAPE, **family.theirs}
    rope = family.rope if name == "gemma3" else {"rope_type": "default", "rope_theta": 70.0, **family.rope}
    outer = {"tie_word_embeddings": tied, **({"mm_tokens_per_image": 4} if name == "gemma3" else {})}
    return getattr(transformers, f"{CLASSES[name]}Config")(
        text_config={**text, "rope_parameters": rope},
        vision_config={"hidden_size": 16, "intermediate_size": 13, **EYES[name]},
        **outer,
    )


def whole_model(name: str) -> Any:
    """transformers' model with random weights, in evaluation. Its first one takes seconds: its imports."""
    torch.manual_seed(0)
    config = whole_config(name)
    config.text_config._attn_implementation = config.text_config._experts_implementation = "eager"
    model = getattr(transformers, f"{CLASSES[name]}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter) - 0.5)
        slow_decay(model)
    return model


def write(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    write_tokenizer(folder)
    return folder


def ids() -> Tensor:
    return torch.randint(VOCAB, (2, 29), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
@pytest.mark.real
@pytest.mark.parametrize("name", list(CLASSES))
def test_the_logits_of_text_are_theirs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = whole_model(name)
    expected_BSV = theirs(input_ids=ids()).logits
    scale = expected_BSV.abs().max().item()
    assert scale > 1
    source = write(theirs, tmp_path / "source")
    capsys.readouterr()
    ours = open_model(source, trained_config).build()
    left = {n: t for n, t in tensors_of(source).items() if n.startswith(OUTERS[name].left_out)}
    size = sum(tensor.nbytes for tensor in left.values())
    assert f"{len(left)} tensor(s), {size:,} bytes, of what reads images" in capsys.readouterr().err
    torch.testing.assert_close(ours.logits(ours(ids()).hidden_BSD), expected_BSV, rtol=0, atol=1e-5 * scale)


@torch.no_grad()
@pytest.mark.real
@pytest.mark.parametrize("name", list(CLASSES))
def test_an_export_is_the_language_model_alone(name: str, tmp_path: Path) -> None:
    """From names as transformers 5 saves them, and from its own layout; its class has the logits."""
    theirs = whole_model(name)
    expected_BSV = theirs(input_ids=ids()).logits
    scale = expected_BSV.abs().max().item()
    source = write(theirs, tmp_path / "source")
    other = write(theirs, tmp_path / "other", save_original_format=False)
    if name == "gemma3":
        assert tensors_of(other).keys() != tensors_of(source).keys()
    out = export(convert(source, tmp_path / "ours"), tmp_path / "out")
    straight = export(other, tmp_path / "straight")
    assert_same_tensors(out, straight)
    config = json.loads((out / "config.json").read_text())
    assert json.loads((straight / "config.json").read_text()) == config
    assert config["model_type"] == OUTERS[name].text
    assert "vision_config" not in config
    assert config["max_position_embeddings"] == theirs.config.text_config.max_position_embeddings
    torch.testing.assert_close(load_theirs(out)(ids()).logits, expected_BSV, rtol=0, atol=1e-5 * scale)


@pytest.mark.real
def test_a_layer_that_predicts_further_is_left_out_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(whole_model("qwen3_5_moe"), tmp_path / "source")
    further = {"mtp.fc.weight": torch.ones(31, 62)}
    save_file(tensors_of(source) | further, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "ours")
    said = capsys.readouterr().err
    assert "of what reads images (model.visual." in said
    assert "1 tensor(s) of layers that predict further tokens (mtp.fc.weight" in said


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The language model, and a folder of one around it, as on the hub."""
    text, folder = CASES["gemma3_text"].their_model(torch.float32), tmp_path_factory.mktemp("hand") / "whole"
    write(text, folder)
    inner = json.loads((folder / "config.json").read_text())
    whole = published("gemma3") | {"text_config": inner}
    (folder / "config.json").write_text(json.dumps(whole))
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors_of(folder).items()}
    eyes = {"vision_tower.vision_model.a": torch.ones(7, 5), "multi_modal_projector.b": torch.ones(3)}
    save_file(tensors | eyes, folder / "model.safetensors", {"format": "pt"})
    return text, folder


@torch.no_grad()
def test_a_file_of_the_hub_gives_the_language_model(
    by_hand: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, folder = by_hand
    ours = open_model(folder, trained_config).build()
    assert "2 tensor(s), 152 bytes, of what reads images (" in capsys.readouterr().err
    torch.testing.assert_close(ours.logits(ours(ids()).hidden_BSD), text(ids()).logits, rtol=1e-5, atol=1e-5)
    out = export(folder, tmp_path / "out")
    assert tensors_of(out).keys() == {n for n, _ in text.state_dict().items() if n != "lm_head.weight"}
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["eos_token_id"]) == ("gemma3_text", [1, 106])


def test_a_name_in_two_spellings_and_a_strange_one(
    by_hand: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, source = by_hand
    tensors = tensors_of(source)
    double = {"model.language_model.norm.weight": tensors["language_model.model.norm.weight"].clone()}
    stray = {"audio_tower.weight": torch.ones(3)}
    for more, words in (
        (double, "are one tensor of the language model"),
        (stray, "audio_tower.weight has no"),
    ):
        folder = tmp_path / words[:5]
        shutil.copytree(source, folder)
        save_file(tensors | more, folder / "model.safetensors", {"format": "pt"})
        assert words in refused(capsys, "convert", f"source={folder}", f"target={tmp_path}/new")


def published(name: str) -> dict[str, Any]:
    """A config of the hub's kind, without what its makers leave to defaults."""
    text = {"hidden_size": 2560, "num_hidden_layers": 34, "intermediate_size": 10240}
    if name == "gemma3":
        return {
            "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
            "boi_token_index": 255999, "eoi_token_index": 256000, "eos_token_id": [1, 106],
            "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
            "text_config": {
                **text, "model_type": "gemma3_text", "sliding_window": 1024,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
            "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
        }  # fmt: skip
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe",
        "image_token_id": 248056, "video_token_id": 248057, "vision_start_token_id": 248053,
        "vision_end_token_id": 248054, "tie_word_embeddings": False, "vision_config": {}, "text_config": text,
    }  # fmt: skip


def test_keys_of_the_outer_config() -> None:
    """Token ids at the top are the model's; the outer word on ties counts, as in transformers."""
    found = text_config(published("gemma3"), "config.json")
    assert found["eos_token_id"] == [1, 106]
    assert (found["model_type"], found["tie_word_embeddings"]) == ("gemma3_text", True)
    assert found["rope_scaling"] == {"factor": 8.0, "rope_type": "linear"}
    assert "vision_config" not in found
    qwen = published("qwen3_5_moe")
    qwen["text_config"] = {**qwen["text_config"], "tie_word_embeddings": True}
    assert text_config(qwen, "config.json")["tie_word_embeddings"] is False
    assert text_config({"model_type": "llama", "text_config": 3}, "config.json")["text_config"] == 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"text_config": None}, "text_config is None, not an object"),
        ({"text_config": {"model_type": "gemma2"}}, "text_config.model_type='gemma2' is not gemma3_text"),
        ({"architectures": ["Gemma3ForSequenceClassification"]}, "is not Gemma3ForConditionalGeneration"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, not true or false"),
        ({"audio_config": {"a": 1}}, "audio_config={'a': 1} is not known here"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
    ],
)
def test_an_outer_config_that_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as raised:
        text_config(published("gemma3") | values, "config.json")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", list(CLASSES))
def test_no_outer_key_of_theirs_is_unknown(name: str) -> None:
    """Each is read, required, or known without effect."""
    config = whole_config(name).to_dict()
    text_config(json.loads(json.dumps(config)), "config.json")
    for key in config:
        said = ""
        try:
            text_config(config | {key: "another"}, "config.json")
        except UserError as error:
            said = str(error)
        assert "is not known here" not in said, key
