"""Cheap results, such as norms and rotations, are not saved for the backward pass but computed again.

Within :func:`dropping_cheap`, wherever autograd would save a tensor that :func:`cheap` has registered, it
saves how to compute it instead. Operation, operands and shapes are the same, and so are the bits. A result
that several operations need is computed once, and freed after the last has used it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Again = Callable[[], Tensor]


class _Cheap:
    """A result that can be computed again. ``held`` keeps its storage from reuse for as long as needed."""

    def __init__(self, held: Tensor, again: Again) -> None:
        self.held: Tensor | None = held
        self.again = again
        self.wanted = 0
        self.made: Tensor | None = None

    def want(self, view: Tensor) -> Again:
        """A function that returns a view of the result; it may be called once."""
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
    """A context for one block: registered results are held until it ends."""
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
    """Whether :func:`cheap` has an effect: within a block, and not while it is compiled."""
    return not torch.compiler.is_compiling() and _known.get() is not None and torch.is_grad_enabled()


def cheap(result: Tensor, again: Again) -> Tensor:
    """``result``, registered. ``again`` computes it anew with the same strides, and must hold no tensors."""
    known = _known.get()
    if known is not None:
        known[_key(result)] = _Cheap(result.detach(), again)
    return result


def source(operand: Tensor) -> Again:
    """A function that returns an operand later: from memory, or computed again if that is cheap too."""
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
