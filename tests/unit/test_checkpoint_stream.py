"""Checkpoints tensor by tensor: what is written can be read, and memory holds one tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moetrain.errors import UserError
from moetrain.models.hf.source import TensorInfo
from moetrain.train.checkpoint_stream import StoredTensors, write_streamed

SHAPES = {"model.a": (3, 5), "model.b": (7,), "model.c": (0, 2), "model.d": (11, 2), "optim.a": (2,)}


def test_each_tensor_is_given_back_before_the_next_is_read(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}
    given: dict[str, torch.Tensor] = {}

    def read(name: str) -> torch.Tensor:
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in given.values())
        assert name not in given
        given[name] = values[name].clone()
        return given[name]

    infos = {name: TensorInfo(shape, torch.bfloat16) for name, shape in SHAPES.items()}
    write_streamed(tmp_path / "step_00000003", 3, infos, read, lambda: {"read": list(given)})
    stored = StoredTensors(tmp_path, "model.")
    assert sorted(stored.extra["read"]) == sorted(SHAPES)
    assert sorted(stored.tensors) == ["a", "b", "c", "d"]
    assert all(torch.equal(stored.read(name), values[f"model.{name}"]) for name in stored.tensors)


def test_what_the_reader_says_is_what_is_raised(tmp_path: Path) -> None:
    def read(name: str) -> torch.Tensor:
        raise UserError("the source is broken")

    with pytest.raises(UserError, match="^the source is broken$"):
        write_streamed(tmp_path / "step", 0, {"a": TensorInfo((2,), torch.float32)}, read, dict)
