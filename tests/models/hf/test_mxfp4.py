"""GPT-OSS in MXFP4: read as transformers dequantises it, in parts too; what is no such checkpoint is refused.

Shapes: E experts, A inputs, B outputs, G = A / 32 blocks, n bytes of a block.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import convert, export, load_ours, load_theirs, tensors_of, write_tokenizer
from hf_newer import GPT_OSS
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moetrain.errors import UserError
from moetrain.models.hf.mxfp4 import Mxfp4, dequantise
from moetrain.models.hf.pieces import fill_block
from moetrain.models.hf.source import SafetensorsFolder, open_source

LARGER = {"hidden_size": 64, "intermediate_size": 96}
QUANTISED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def packed(experts: int, inputs: int, outputs: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (experts, outputs, inputs // 32)
    return {
        "_blocks": torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8),
        "_scales": torch.randint(118, 124, shape, generator=generator, dtype=torch.uint8),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As OpenAI published theirs: all in bf16 but the experts' matrices."""
    target = tmp_path_factory.mktemp("mxfp4")
    theirs = replace(GPT_OSS, theirs={**GPT_OSS.theirs, **LARGER}).their_model(torch.bfloat16)
    theirs.save_pretrained(target)
    tensors = tensors_of(target)
    for number, name in enumerate(sorted(tensors)):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensors.pop(name).shape
            tensors |= {name + end: t for end, t in packed(experts, inputs, outputs, number).items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTISED}))
    return target


def test_every_byte_at_every_scale_is_theirs_to_the_bit() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 1, 16).expand(16, 256, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).expand(16, 256).contiguous()
    found = dequantise(blocks, scales)
    theirs = convert_moe_packed_tensors(blocks[None], scales[None])[0].t()
    assert torch.equal(found.view(torch.int16), theirs.contiguous().view(torch.int16))


def test_a_converted_model_has_their_weights_and_goes_out_plain(folder: Path, tmp_path: Path) -> None:
    converted = convert(folder, tmp_path / "ours")
    _, ours = load_ours(converted)
    stored = tensors_of(folder)
    for layer, block in enumerate(ours.blocks):
        start, experts = f"model.layers.{layer}.mlp.experts.", block.feed_forward.experts
        up, down = (
            convert_moe_packed_tensors(stored[start + n + "_blocks"], stored[start + n + "_scales"])
            for n in ("gate_up_proj", "down_proj")
        )
        assert torch.equal(experts.w_gate_up_EDCF[:, :, 0], up[..., ::2].float())
        assert torch.equal(experts.w_gate_up_EDCF[:, :, 1], up[..., 1::2].float())
        assert torch.equal(experts.w_down_EFD, down.float())
    exported = export(converted, tmp_path / "theirs")
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())
    again = load_theirs(exported)
    assert again.dtype is torch.bfloat16
    ids = torch.arange(11)[None]
    logits = ours.logits(ours(ids).hidden_BSD)
    torch.testing.assert_close(
        again.float()(ids).logits, logits, rtol=0, atol=1e-5 * logits.abs().max().item()
    )


def test_any_part_is_that_of_the_whole(folder: Path) -> None:
    """Cut as layouts cut: by experts, by inputs at any place, and gate from up."""
    opened = open_source(SafetensorsFolder(folder))
    for end in ("w_gate_up_EDCF", "w_down_EFD", "bias_gate_up_ECF", "bias_down_ED"):
        name = f"blocks.1.feed_forward.experts.{end}"
        whole = opened.read(name)
        for dim, size in enumerate(whole.shape):
            for start, length in ((0, 1), (size // 3, size // 2), (size - 1, 1)):
                block = torch.empty_like(whole.narrow(dim, start, length))
                offsets = [start if d == dim else 0 for d in range(whole.ndim)]
                fill_block(block, offsets, opened.table[name].pieces, opened.source.read)
                assert torch.equal(block, whole.narrow(dim, start, length)), (end, dim, start)


class Stored:
    """A source of the tensors and the ``quantization_config`` that it is given."""

    path = Path("here")

    def __init__(self, said: dict[str, Any], **tensors: Tensor) -> None:
        self.config = {"quantization_config": said}
        self.tensors: Any = tensors


PAIR = {"x" + end: tensor for end, tensor in packed(2, 32, 3, 0).items()}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (Stored({"quant_method": "mxfp4", "bits": 4}, **PAIR), "bits=4 is not known for mxfp4"),
        (Stored(QUANTISED, y=torch.zeros(2)), r"no tensor is named \*_blocks"),
        (Stored(QUANTISED, x_blocks=PAIR["x_blocks"]), "x_blocks is there, but x_scales is not"),
        (Stored(QUANTISED, x_scales=PAIR["x_scales"]), "x_scales is there, but x_blocks is not"),
        (Stored(QUANTISED, **PAIR, x=torch.zeros(2)), "x is stored twice"),
        (Stored(QUANTISED, **{**PAIR, "x_scales": PAIR["x_scales"][:1]}), r"x_scales \[1, 3, 1\]"),
        (Stored(QUANTISED, **{**PAIR, "x_blocks": PAIR["x_blocks"].int()}), "of U8 are read"),
    ],
)
def test_what_is_no_such_checkpoint_is_refused(source: Stored, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Mxfp4(source)  # type: ignore[arg-type]


def test_bytes_without_a_word_of_them_are_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(UserError, match="_blocks is U8; only F64, F32, F16, BF16 are read"):
        open_source(SafetensorsFolder(tmp_path))
