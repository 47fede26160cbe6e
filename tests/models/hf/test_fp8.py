"""Weights in fp8 blocks: those that transformers dequantises, read by parts too, and what is refused.

Shapes: A rows, B columns of a matrix.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import CASES, convert, export, load_ours, load_theirs, refused, tensors_of, write_theirs
from hf_family import Family, transformers
from hf_weights import from_hf
from safetensors.torch import save_file
from torch import Tensor

from moetrain.errors import UserError
from moetrain.models.hf.fp8 import BlockFp8
from moetrain.models.hf.tensors import Part, TensorInfo

BLOCK = (8, 4)
CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(BLOCK),
}
_V3 = CASES["deepseek_v3"]
WHOLE_BLOCKS: Family = replace(  # transformers takes no others
    _V3,
    theirs={
        **_V3.theirs,
        "hidden_size": 48,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "q_lora_rank": 16,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_nextn_predict_layers": 0,
    },
)


def quantised(matrix_AB: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """In fp8 with the factors of its blocks, the largest number of each being 448."""
    factors = torch.stack(
        [
            torch.stack([part.abs().amax().float() / 448 for part in rows.split(block[1], 1)])
            for rows in matrix_AB.split(block[0], 0)
        ]
    )
    wide = spread(factors, block, matrix_AB.shape)
    return (matrix_AB.float() / wide).to(torch.float8_e4m3fn), factors


def spread(factors: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """Each element's factor, by its own place."""
    rows, columns = (torch.arange(size) // of for size, of in zip(shape, block, strict=True))
    return factors[rows][:, columns]


def in_fp8(source: Path, target: Path, **config: Any) -> Path:
    """A copy of ``source`` whose projections are in fp8."""
    shutil.copytree(source, target)
    tensors = tensors_of(source)
    for name in [name for name in tensors if "_proj" in name and tensors[name].ndim == 2]:
        tensors[name], tensors[f"{name}_scale_inv"] = quantised(tensors[name])
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    said = json.loads((source / "config.json").read_text()) | {"quantization_config": CONFIG | config}
    (target / "config.json").write_text(json.dumps(said))
    return target


def test_they_are_transformers_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every weight to the bit, and the export is a model like any other."""
    source = in_fp8(
        write_theirs(WHOLE_BLOCKS.their_model(torch.bfloat16), tmp_path / "source"), tmp_path / "fp8"
    )
    scheme = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=BLOCK)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=scheme, dtype=torch.bfloat16
    )
    converted = convert(source, tmp_path / "ours")
    _, ours = load_ours(converted)
    expected = from_hf({name: t for name, t in theirs.state_dict().items() if not name.endswith("inv_freq")})
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor.float())]
    assert not different
    exported = export(converted, tmp_path / "out")
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())
    again = from_hf(load_theirs(exported).state_dict())
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    for change, words in (
        ({"activation_scheme": "static"}, "quantization_config: activation_scheme='static' is not"),
        ({"weight_block_size": None}, "weight_block_size is None, not the rows and columns"),
        ({"bits": 4}, "bits=4 is not known"),
        ({"quant_method": "gptq"}, "quantization_config="),
    ):
        said = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(said | {"quantization_config": CONFIG | change}))
        assert words in refused(capsys, "convert", f"source={source}", f"target={tmp_path}/new")
        (source / "config.json").write_text(json.dumps(said))


class Memory:
    """A source of tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        self.path, self._tensors = Path("here"), tensors
        self.config: dict[str, Any] = config
        self.tensors = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}

    def read(self, name: str, part: Part | None = None) -> Tensor:
        return self._tensors[name][... if part is None else part].clone()


@pytest.mark.parametrize("shape", [(19, 13), (8, 4), (3, 2), (576 // 8, 5)])
def test_a_part_is_that_of_the_whole(shape: tuple[int, int]) -> None:
    """Whatever it begins with; the last blocks of a matrix may be smaller."""
    torch.manual_seed(0)
    matrix_AB = torch.randn(*shape).mul_(torch.logspace(-3, 1, shape[1]))
    weight, factors = quantised(matrix_AB)
    config = {"quantization_config": CONFIG, "dtype": "float32"}
    source = BlockFp8(Memory({"w": weight, "w_scale_inv": factors, "n": torch.ones(3)}, config))
    assert list(source.tensors) == ["w", "n"]
    assert source.config == {"dtype": "float32"}
    expected_AB = weight.float() * spread(factors, BLOCK, matrix_AB.shape)
    torch.testing.assert_close(expected_AB, matrix_AB, rtol=0.07, atol=1e-4)
    assert torch.equal(source.read("w"), expected_AB)
    assert torch.equal(source.read("n", (slice(1, 3),)), torch.ones(2))
    starts = [(a, b) for a in range(0, shape[0], 3) for b in range(0, shape[1], 2)]
    for a, b in starts:
        part = (slice(a, min(a + 7, shape[0])), slice(b, min(b + 5, shape[1])))
        assert torch.equal(source.read("w", part), expected_AB[part])


FP8 = torch.zeros(9, 5).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({"w": FP8}, {}, "w is [9, 5] in F8_E4M3, but w_scale_inv is not there"),
        ({"w": FP8, "w_scale_inv": torch.ones(2, 1)}, {}, "float32[2, 1], but [9, 5] in blocks of"),
        ({"w": FP8, "w_scale_inv": torch.ones(2, 2).int()}, {}, "w_scale_inv is int32[2, 2]"),
        ({"w": FP8[None], "w_scale_inv": torch.ones(1, 2, 2)}, {}, "only matrices are read so"),
        ({"w": FP8.float(), "w_scale_inv": torch.ones(2, 2)}, {}, "w_scale_inv is there, but no w in fp8"),
        ({"w": FP8.float()}, {}, "says fp8, but no tensor is F8_E4M3"),
        ({"w": FP8, "w_scale_inv": torch.ones(2, 2)}, {"dtype": "int8"}, "dtype='int8' is none of"),
    ],
)  # fmt: skip
def test_what_does_not_fit(tensors: dict[str, Tensor], config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        BlockFp8(Memory(tensors, {"quantization_config": CONFIG, **config}))
    assert words in str(error.value)


def test_without_the_config_they_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_theirs(CASES["llama"].their_model(torch.bfloat16), tmp_path / "source")
    folder = in_fp8(source, tmp_path / "fp8")
    shutil.copy(source / "config.json", folder / "config.json")
    line = refused(capsys, "convert", f"source={folder}", f"target={tmp_path}/new")
    assert "is F8_E4M3; only F64, F32, F16, BF16 are read" in line
