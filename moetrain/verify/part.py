"""What a rank holds of a tensor, to be compared with the whole of it: no rank sends its part to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.checkpoint.blocks import tiles
from moetrain.ops.local_part import local_part


@dataclass(frozen=True)
class Part:
    """``value`` begins at ``offsets`` of a tensor of ``shape``."""

    value: Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def place(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offsets and sizes."""
        return self.offsets, tuple(self.value.shape)

    def of(self, whole: Tensor) -> Tensor:
        """The same part of another tensor of ``shape``."""
        return whole[tuple(slice(a, a + n) for a, n in zip(self.offsets, self.value.shape, strict=True))]


def part_of(tensor: Tensor) -> Part:
    """A copy of this rank's part of a DTensor; any other tensor is whole. Any rank may ask alone."""
    offsets = (0,) * tensor.ndim
    if isinstance(tensor, DTensor):
        (chunk,) = tensor.__create_chunk_list__()  # what distributed checkpoints go by
        offsets = tuple(chunk.offsets)
    return Part(local_part(tensor.detach()).clone(), tuple(tensor.shape), offsets)


def all_there(parts: Sequence[Part]) -> bool:
    """Whether the ranks' parts are of one shape and together the whole; alike ones count once."""
    shapes = {part.shape for part in parts}
    return len(shapes) == 1 and tiles(parts[0].shape, list({part.place for part in parts}))
