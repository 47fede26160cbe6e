"""How the tensors of another model's checkpoint tile ours: data, so that one table serves both ways.

Shapes: sizes and offsets are in elements along the dimensions of our tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moetrain.errors import UserError
from moetrain.models.hf.tensors import Part

_LISTED = 8  # names in one message


@dataclass(frozen=True)
class Piece:
    """One tensor of theirs, or a block of one, and the block of ours that it fills.

    ``shape`` is that of theirs, or of its block; ``dims`` are our dimensions in the order in which theirs has
    them; those before them have size 1. The block has size 1 in our others (an expert's number, gate or up).
    ``stored``: the shape of their
    whole tensor, of which other pieces are the rest, and ``at``: where in it the block begins; (): it is all.
    """

    theirs: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    stored: tuple[int, ...] = ()
    at: tuple[int, ...] = ()

    @staticmethod
    def whole(theirs: str, shape: tuple[int, ...]) -> Piece:
        """A tensor that both have alike."""
        return Piece(theirs, (0,) * len(shape), shape, shape, tuple(range(len(shape))))

    @staticmethod
    def rows(theirs: str, stored: tuple[int, ...], at: int, ours: int, number: int) -> Piece:
        """``number`` rows of their tensor from ``at`` on, which are those of ours from ``ours`` on."""
        rest, zeros = stored[1:], (0,) * (len(stored) - 1)
        shape = (number, *rest)
        return Piece(theirs, (ours, *zeros), shape, shape, tuple(range(len(stored))), stored, (at, *zeros))

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of their tensor."""
        return self.stored or self.shape

    def part(self, starts: Sequence[int], stops: Sequence[int]) -> Part | None:
        """The part of theirs that fills ours from ``starts`` to ``stops``; None: the whole of it."""
        sizes = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        if sizes == self.sizes and not self.stored:
            return None
        ours = tuple(
            (start - offset, stop - offset)
            for start, stop, offset in zip(starts, stops, self.offsets, strict=True)
        )
        at = self.at or (0,) * len(self.dims)
        return (slice(0, 1),) * self._ones + tuple(
            slice(first + ours[dim][0], first + ours[dim][1])
            for first, dim in zip(at, self.dims, strict=True)
        )

    @property
    def _ones(self) -> int:
        """How many dimensions of size 1 theirs has before ``dims``."""
        return len(self.shape) - len(self.dims)

    def to_ours(self, tensor: Tensor) -> Tensor:
        """Their tensor, or a part of it, as ours has it; a view."""
        tensor = tensor[(0,) * self._ones]
        tensor = tensor.permute(sorted(range(tensor.ndim), key=self.dims.__getitem__))
        for dim in sorted(set(range(len(self.sizes))) - set(self.dims)):
            tensor = tensor.unsqueeze(dim)
        return tensor

    def to_theirs(self, ours: Tensor) -> Tensor:
        """Their tensor, or their block, contiguous, cut out of the whole of ours."""
        block = ours
        for dim, (start, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            block = block.narrow(dim, start, size)
        alone = tuple(sorted(set(range(len(self.sizes))) - set(self.dims)))
        return block.permute(*self.dims, *alone).reshape(self.shape).contiguous()


@dataclass(frozen=True)
class Tiled:
    """One tensor of ours, of ``shape``, and what it is made of; no pieces: fp32 zeros, not stored by them."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()


Table = dict[str, Tiled]  # by our names


class Read(Protocol):
    """Their tensor by name, or a part of it."""

    def __call__(self, name: str, part: Part | None = None, /) -> Tensor: ...


def fill_block(block: Tensor, offsets: Sequence[int], pieces: Sequence[Piece], read: Read) -> None:
    """Fill ``block``, which lies at ``offsets`` of our whole tensor; reads no more than what it takes.

    The values are cast to ``block``'s dtype.
    """
    if not pieces:
        block.zero_()
    for piece in pieces:
        starts = [max(o, p) for o, p in zip(offsets, piece.offsets, strict=True)]
        stops = [
            min(o + size, p + length)
            for o, size, p, length in zip(offsets, block.shape, piece.offsets, piece.sizes, strict=True)
        ]
        if any(stop <= start for start, stop in zip(starts, stops, strict=True)):
            continue
        here = block
        for dim, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            here = here.narrow(dim, start - offsets[dim], stop - start)
        # Held by no name here: the next piece is read when this one is gone.
        here.copy_(piece.to_ours(read(piece.theirs, piece.part(starts, stops))))


def by_theirs(table: Table) -> dict[str, list[tuple[str, Piece]]]:
    """Each tensor of theirs with its pieces, and of each our name."""
    found: dict[str, list[tuple[str, Piece]]] = {}
    for ours, tiled in table.items():
        for piece in tiled.pieces:
            found.setdefault(piece.theirs, []).append((ours, piece))
    return found


def joined(parts: Sequence[tuple[str, Piece]], read: Callable[[str], Tensor]) -> Tensor:
    """One tensor of theirs out of its pieces; ``read`` gives ours by name, whole."""
    (ours, first), *more = parts
    tensor = first.to_theirs(read(ours))
    if not more and not first.stored:
        return tensor
    whole = tensor.new_empty(first.whole_shape)
    for name, piece in parts:
        block = tuple(slice(at, at + size) for at, size in zip(piece.at, piece.shape, strict=True))
        whole[block] = piece.to_theirs(read(name))
    return whole


def check_source(table: Table, theirs: Mapping[str, Sequence[int]], where: str) -> None:
    """Raises one UserError unless ``theirs`` (name -> shape) holds just the pieces of ``table``, in shape.

    So every tensor of the source is used exactly once and every one of ours is filled.
    """
    wanted = {piece.theirs: piece.whole_shape for tiled in table.values() for piece in tiled.pieces}
    complaints = [f"{name} is missing" for name in wanted if name not in theirs]
    complaints += [f"{name} has no place in this model" for name in theirs if name not in wanted]
    complaints += [
        f"{name} is {list(theirs[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in theirs and tuple(theirs[name]) != shape
    ]
    if complaints:
        more = f"; and {len(complaints) - _LISTED} more" if len(complaints) > _LISTED else ""
        raise UserError(
            f"{where} does not hold the tensors of the model that its config describes: "
            f"{len(complaints)} difference(s): {'; '.join(complaints[:_LISTED])}{more}"
        )
