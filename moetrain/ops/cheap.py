"""Cheap results are not kept for backward: norms and rotations are computed again from what is kept anyway.

Within :func:`dropping_cheap` a tensor that was made known by :func:`cheap` is replaced, wherever an operation
keeps it, by how to make it again. Operation, operands and shapes are the same, and so are the bits. What
several operations want is made once, and given up when the last has had it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Again = Callable[[], Tensor]


class _Cheap:
    """A result that can be made again; ``held`` only so long that no other tensor can take its storage."""

    def __init__(self, held: Tensor, again: Again) -> None:
        self.held: Tensor | None = held
        self.again = again
        self.wanted = 0
        self.made: Tensor | None = None

    def want(self, view: Tensor) -> Again:
        """How to get at a view of it once."""
        self.wanted += 1
        place = (view.size(), view.stride(), view.storage_offset())
        return lambda: self._once().as_strided(*place)

    def _once(self) -> Tensor:
        made = self.again() if self.made is None else self.made
        self.wanted -= 1
        self.made = made if self.wanted > 0 else None
        return made


_known: ContextVar[dict[int, _Cheap] | None] = ContextVar("_known", default=None)


@contextmanager
def dropping_cheap() -> Iterator[None]:
    """Of one block: what is cheap is held until the block ends, and forgotten then."""
    known: dict[int, _Cheap] = {}
    token = _known.set(known)
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _known.reset(token)
        for result in known.values():
            result.held = None


def dropping() -> bool:
    """Whether it is of use to call :func:`cheap`: within a block, and not while it is compiled."""
    return not torch.compiler.is_compiling() and _known.get() is not None and torch.is_grad_enabled()


def cheap(result: Tensor, again: Again) -> Tensor:
    """``result``, which ``again`` makes once more with the same strides; it should hold nothing by itself."""
    known = _known.get()
    if known is not None:
        known[_key(result)] = _Cheap(result.detach(), again)
    return result


def source(operand: Tensor) -> Again:
    """How a cheap result gets at its operand later: from memory, or made again where that is cheap too."""
    found = (_known.get() or {}).get(_key(operand))
    if found is not None:
        return found.want(operand)
    kept = operand.detach()
    return lambda: kept


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _pack(kept: Tensor) -> Tensor | Again:
    found = (_known.get() or {}).get(_key(kept))
    return kept if found is None else found.want(kept)


def _unpack(packed: Tensor | Again) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    with torch.no_grad():
        return packed()
