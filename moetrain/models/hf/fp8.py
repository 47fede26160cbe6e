"""Weights in fp8 (e4m3), DeepSeek's: blocks of a matrix, of 128 rows and columns, share a factor in fp32.

``<name>`` in float8_e4m3fn and ``<name>_scale_inv``, one number a block, stand for their product, which is
taken in fp32 and becomes the dtype that config.json says of the model. The last blocks of rows and of columns
may be smaller (DeepSeek-AI 2024, "DeepSeek-V3", arXiv:2412.19437, section 3.3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetrain.errors import UserError, quoted
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.tensors import Part, Source, TensorInfo

_KEY, _SCALE = "quantization_config", "_scale_inv"
_SCALES = (torch.float32, torch.bfloat16)
_TARGETS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_BLOCK = [128, 128]


class BlockFp8:
    """A source whose matrices in fp8 are those that they stand for; the other tensors stay as they are.

    Raises UserError for options of another scheme, a matrix without its factors or the reverse, and where
    there is none at all.
    """

    def __init__(self, source: Source) -> None:
        self._source, self.path = source, source.path
        self.config: dict[str, Any] = {k: v for k, v in source.config.items() if k != _KEY}
        self._block = _block(Fields(source.config[_KEY], f"{self.path}: config.json: {_KEY}"))
        dtype = _target(source)
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in source.tensors.items():
            if info.dtype is torch.float8_e4m3fn:
                self._check(name, info)
                self.tensors[name] = TensorInfo(info.shape, dtype)
            elif not name.endswith(_SCALE):
                self.tensors[name] = info
            elif not self._is_scaled(name.removesuffix(_SCALE)):
                raise UserError(f"{self.path}: {name} is there, but no {name.removesuffix(_SCALE)} in fp8")
        if not any(self._is_scaled(name) for name in self.tensors):
            raise UserError(f"{self.path}: {_KEY} says fp8, but no tensor is F8_E4M3")

    def read(self, name: str, part: Part | None = None) -> Tensor:
        quantised = self._source.read(name, part)
        if not self._is_scaled(name):
            return quantised
        wanted = part or tuple(slice(0, size) for size in self.tensors[name].shape)
        covering: list[slice] = []
        for of, size in zip(wanted, self._block, strict=True):
            assert isinstance(of, slice)
            covering.append(slice(of.start // size, -(-of.stop // size)))
        factors = self._source.read(name + _SCALE, tuple(covering)).float()
        for dim, (of, size) in enumerate(zip(wanted, self._block, strict=True)):
            assert isinstance(of, slice)
            factors = factors.repeat_interleave(size, dim)
            factors = factors.narrow(dim, of.start % size, of.stop - of.start)
        return quantised.float().mul_(factors).to(self.tensors[name].dtype)

    def _is_scaled(self, name: str) -> bool:
        info = self._source.tensors.get(name)
        return info is not None and info.dtype is torch.float8_e4m3fn

    def _check(self, name: str, info: TensorInfo) -> None:
        scale = self._source.tensors.get(name + _SCALE)
        if len(info.shape) != 2 or scale is None:
            lost = f"{name}{_SCALE} is not there" if scale is None else "only matrices are read so"
            raise UserError(f"{self.path}: {name} is {list(info.shape)} in F8_E4M3, but {lost}")
        blocks = tuple(-(-size // block) for size, block in zip(info.shape, self._block, strict=True))
        if scale.shape != blocks or scale.dtype not in _SCALES:
            kind = str(scale.dtype).removeprefix("torch.")
            raise UserError(
                f"{self.path}: {name}{_SCALE} is {kind}{list(scale.shape)}, but {list(info.shape)} in blocks "
                f"of {list(self._block)} has {list(blocks)} factors, in fp32 or bf16"
            )


def _block(said: Fields) -> tuple[int, int]:
    """Rows and columns of a block. Raises UserError for what this scheme does not do."""
    said.must_be("quant_method", "fp8")
    said.must_be("fmt", "e4m3")
    said.must_be("activation_scheme", "dynamic")  # which is of computing in fp8, not of weights
    said.must_be("expert_dtype", "fp8")
    # which modules are quantised their tensors say, as they say of factors what they are
    said.without_effect(
        "modules_to_not_convert", "modules_to_convert", "ignored_layers", "scale_fmt", "dequantize"
    )
    block = said.get("weight_block_size") if said.has("weight_block_size") else _BLOCK
    if not isinstance(block, list) or [type(size) for size in block] != [int, int] or min(block) < 1:
        raise said.refuse(f"weight_block_size is {quoted(block)}, not the rows and columns of a block")
    if unknown := sorted(said.unused()):
        raise said.refuse(f"{unknown[0]}={quoted(said.values[unknown[0]])} is not known of fp8")
    return block[0], block[1]


def _target(source: Source) -> torch.dtype:
    """What transformers loads the model in: the config's ``dtype``, or bf16 where it says none."""
    for key in ("dtype", "torch_dtype"):
        if (name := source.config.get(key)) is not None:
            if not isinstance(name, str) or name not in _TARGETS:
                known = ", ".join(_TARGETS)
                raise UserError(f"{source.path}: config.json: {key}={quoted(name)} is none of {known}")
            return _TARGETS[name]
    return torch.bfloat16
