"""Reading a part of a stored block a few rows at a time, so that memory never holds the block.

A block is one tensor as torch.save writes it (:mod:`moetrain.checkpoint.blocks` checks that it is).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO, cast

import torch
from torch import Tensor

from moetrain.checkpoint.blocks import BlockError, Slice
from moetrain.models.hf.tensors import bytes_of

_AT_ONCE = 2**24  # bytes that are read before they are copied


class StoredBlock:
    """A checked block of ``dtype`` and ``sizes``. Raises BlockError where its pickle says otherwise."""

    def __init__(self, stream: Slice, dtype: torch.dtype, sizes: Sequence[int]) -> None:
        self._stream = stream
        # Without values: only where in the archive they begin, and in which order they lie there.
        described: object = torch.load(cast(BinaryIO, stream), map_location="meta", weights_only=True)
        if not isinstance(described, Tensor):
            raise BlockError(f"its pickle makes a {type(described).__name__}, not a tensor")
        stored = described.untyped_storage()
        found = described.dtype, list(described.shape), stored.nbytes()
        if found != (dtype, list(sizes), described.nbytes):
            raise BlockError(f"its pickle says {found[0]}{found[1]} in {found[2]} bytes")
        assert stored._checkpoint_offset is not None
        self._described, self._begin = described, stored._checkpoint_offset

    @torch.no_grad()
    def copy_part(self, offsets: Sequence[int], target: Tensor) -> None:
        """Fill ``target`` with the part that begins at ``offsets``; the values are cast to its dtype."""
        if not target.numel():
            return
        if not (target.ndim and self._described.is_contiguous()):
            self._stream.seek(0)
            whole = torch.load(cast(BinaryIO, self._stream), map_location="cpu", weights_only=True)
            target.copy_(_narrowed(whole, offsets, target.shape))
            return
        step = max(1, _AT_ONCE // self._described[0].nbytes)
        for at, part in enumerate(target.split(step)):
            rows = self._rows(offsets[0] + at * step, part.shape[0])
            part.copy_(_narrowed(rows, (0, *offsets[1:]), part.shape))

    def _rows(self, first: int, count: int) -> Tensor:
        """``count`` whole rows of the block from ``first`` on."""
        row = self._described[0]
        buffer = torch.empty(count * row.nbytes, dtype=torch.uint8)
        self._stream.seek(self._begin + first * row.nbytes)
        found = self._stream.readinto(bytes_of(buffer))
        if found != len(buffer):
            raise BlockError(f"it ends {len(buffer) - found} bytes early")
        return buffer.view(row.dtype).view(count, *row.shape)


def _narrowed(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    for dim, (start, length) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor
