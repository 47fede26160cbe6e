"""Weights in MXFP4, GPT-OSS's: blocks of 32 numbers of four bits that share a scale, a power of two.

A number is a sign, two bits of exponent and one of mantissa; a scale is an exponent of two plus 127 (Open
Compute Project 2023, "Microscaling Formats (MX)", v1.0). A byte holds two numbers, the first in its low half.
Two tensors stand for one of experts' matrices, which is the transpose of theirs. It becomes bf16, which holds
every product exactly that it can hold at all, as transformers' own does.

Shapes: E experts, A inputs, B outputs, G = A / 32 blocks, n bytes of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetrain.errors import UserError, quoted
from moetrain.models.hf.tensors import Part, Source, TensorInfo

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK, _BYTES, _BIAS = 32, 16, 127
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_KEY = "quantization_config"
_KNOWN = ("quant_method", "modules_to_not_convert", "dequantize")  # the others' names say which are quantised


class Mxfp4:
    """A source whose pairs ``NAME_blocks`` [E, B, G, n] and ``NAME_scales`` [E, B, G] are ``NAME`` [E, A, B].

    Raises UserError for a half of a pair, one of another shape or dtype, and where there is none at all.
    """

    def __init__(self, source: Source) -> None:
        self._source, self.path = source, source.path
        self.config: dict[str, Any] = {k: v for k, v in source.config.items() if k != _KEY}
        said = source.config[_KEY]
        if unknown := sorted(said.keys() - set(_KNOWN)):
            raise UserError(
                f"{self.path}: {_KEY}: {unknown[0]}={quoted(said[unknown[0]])} is not known for mxfp4"
            )
        self._pairs: dict[str, TensorInfo] = {}
        for stored in source.tensors:
            for end in (_BLOCKS, _SCALES):
                if stored.endswith(end):
                    name = stored.removesuffix(end)
                    self._pairs[name] = TensorInfo(self._shape(name), torch.bfloat16)
        if not self._pairs:
            raise UserError(f"{self.path}: {_KEY} says mxfp4, but no tensor is named *{_BLOCKS}")
        plain = {n: i for n, i in source.tensors.items() if not n.endswith((_BLOCKS, _SCALES))}
        if twice := sorted(plain.keys() & self._pairs.keys()):
            raise UserError(f"{self.path}: {twice[0]} is stored twice: as it is, and as {twice[0]}{_BLOCKS}")
        self.tensors = plain | self._pairs

    def read(self, name: str, part: Part | None = None) -> Tensor:
        if name not in self._pairs:
            return self._source.read(name, part)
        whole = tuple(slice(0, size) for size in self.tensors[name].shape)
        experts, inputs, outputs = part or whole
        assert isinstance(inputs, slice)
        first, last = inputs.start // _BLOCK, -(-inputs.stop // _BLOCK)
        rows = (experts, outputs, slice(first, last))
        blocks_EBGn = self._source.read(name + _BLOCKS, (*rows, slice(0, _BYTES)))
        scales_EBG = self._source.read(name + _SCALES, rows)
        skipped = slice(inputs.start - first * _BLOCK, inputs.stop - first * _BLOCK)
        found_EAB = torch.empty(
            (len(blocks_EBGn), inputs.stop - inputs.start, blocks_EBGn.shape[1]), dtype=torch.bfloat16
        )
        for found_AB, blocks_BGn, scales_BG in zip(found_EAB, blocks_EBGn, scales_EBG, strict=True):
            found_AB.copy_(dequantise(blocks_BGn, scales_BG)[:, skipped].t())
        return found_EAB

    def _shape(self, name: str) -> tuple[int, ...]:
        blocks, scales = (self._source.tensors.get(name + end) for end in (_BLOCKS, _SCALES))
        if blocks is None or scales is None:
            there, lost = (_BLOCKS, _SCALES) if scales is None else (_SCALES, _BLOCKS)
            raise UserError(f"{self.path}: {name}{there} is there, but {name}{lost} is not")
        fits = len(blocks.shape) == 4 and blocks.shape[3] == _BYTES and scales.shape == blocks.shape[:3]
        if not fits or {blocks.dtype, scales.dtype} != {torch.uint8}:
            raise UserError(
                f"{self.path}: {name}{_BLOCKS} is {list(blocks.shape)}, and {name}{_SCALES} "
                f"{list(scales.shape)}: [E, B, G, {_BYTES}] and [E, B, G] of U8 are read"
            )
        experts, outputs, count, _ = blocks.shape
        return experts, count * _BLOCK, outputs


def dequantise(blocks_BGn: Tensor, scales_BG: Tensor) -> Tensor:
    """[B, A] in bf16."""
    values = torch.tensor([*_VALUES, *(-value for value in _VALUES)], dtype=torch.bfloat16)
    halves_BGn2 = torch.stack([blocks_BGn & 15, blocks_BGn >> 4], -1)
    exponents_BG11 = scales_BG[..., None, None].to(torch.int32) - _BIAS
    return torch.ldexp(values[halves_BGn2.int()], exponents_BG11).to(torch.bfloat16).flatten(1)
