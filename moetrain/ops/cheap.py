"""Cheap results are not kept for backward: norms and rotations are computed again from what is kept anyway.

Within :func:`dropping_cheap` a tensor that was made known by :func:`cheap` is replaced, wherever an operation
keeps it, by how to make it again. Operation, operands and shapes are the same, and so are the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Again = Callable[[], Tensor]
_Known = dict[int, tuple[Tensor, Again]]  # by storage; the tensor is held, so that no other takes its place

_known: ContextVar[_Known | None] = ContextVar("_known", default=None)


@contextmanager
def dropping_cheap() -> Iterator[None]:
    """Of one block: what is cheap is held until the block ends, and forgotten then."""
    token = _known.set({})
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _known.reset(token)


def cheap(result: Tensor, again: Again) -> Tensor:
    """``result``, which ``again`` makes once more with the same strides; it should hold nothing by itself."""
    known = _known.get()
    if known is not None and torch.is_grad_enabled():
        known[_key(result)] = (result.detach(), again)
    return result


def source(operand: Tensor) -> Again:
    """How a cheap result gets at its operand later: from memory, or made again where that is cheap too."""
    known = _known.get() or {}
    if _key(operand) in known:
        _, again = known[_key(operand)]
        return _Viewed(again, operand)
    kept = operand.detach()
    return lambda: kept


class _Viewed:
    """A view of a cheap tensor, as what makes it again."""

    def __init__(self, again: Again, view: Tensor) -> None:
        self.again = again
        self.place = (view.size(), view.stride(), view.storage_offset())

    def __call__(self) -> Tensor:
        return self.again().as_strided(*self.place)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _pack(kept: Tensor) -> Tensor | _Viewed:
    known = _known.get() or {}
    found = known.get(_key(kept))
    return kept if found is None else _Viewed(found[1], kept)


def _unpack(packed: Tensor | _Viewed) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    with torch.no_grad():
        return packed()
