"""Checkpoints tensor by tensor: what is written can be read, and memory holds one tensor."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from moetrain.checkpoint.read import read_extra
from moetrain.checkpoint.stream import StoredTensors, large_then_small, write_streamed
from moetrain.errors import UserError
from moetrain.models.hf.source import TensorInfo

SHAPES = {f"model.{name}": (size,) for name, size in zip("abcdefg", (3, 700, 5, 701, 0, 703, 7), strict=True)}


def test_what_is_written_is_read_one_large_tensor_at_a_time(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return values[name].clone()

    infos = {name: TensorInfo(shape, torch.bfloat16) for name, shape in SHAPES.items()}
    infos["optim.a"] = TensorInfo((2,), torch.float32)
    values["optim.a"] = torch.ones(2)
    write_streamed(tmp_path / "step_00000003", 3, large_then_small(infos), read, lambda: {"read": asked})
    assert sorted(asked) == sorted(infos)
    sizes = [infos[name].nbytes for name in asked]
    assert max(one + other for one, other in pairwise(sizes)) <= 2 * 703 + 2 * 5
    stored = StoredTensors(tmp_path)
    assert read_extra(stored.path)["read"] == asked
    assert stored.tensors == infos
    assert all(torch.equal(stored.read(name), value) for name, value in values.items())


def test_what_the_reader_says_is_what_is_raised(tmp_path: Path) -> None:
    def read(name: str) -> torch.Tensor:
        raise UserError("the source is broken")

    with pytest.raises(UserError, match=r"^the source is broken$"):
        write_streamed(tmp_path / "step", 0, {"a": TensorInfo((2,), torch.float32)}, read, dict)
    assert list(tmp_path.iterdir()) == []
