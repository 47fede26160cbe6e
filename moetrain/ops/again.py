"""Computing a part of a forward pass again for the backward pass, under what that forward pass ran under."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

Context = Callable[[], AbstractContextManager[object]]

_context: ContextVar[Context | None] = ContextVar("_context", default=None)


@contextmanager
def under(context: Context) -> Iterator[None]:
    """``context()``, which :func:`computed_again` enters anew for what is computed again of this block."""
    if torch.compiler.is_compiling():  # which keeps what it needs
        with context():
            yield
        return
    token = _context.set(context)
    try:
        with context():
            yield
    finally:
        _context.reset(token)


def computed_again(compute: Callable[..., Any], *args: Any) -> Any:
    """``compute(*args)``, of which only the arguments are kept for the backward pass. No random state is."""
    context = None if torch.compiler.is_compiling() else _context.get()
    more: dict[str, Any] = {} if context is None else {"context_fn": lambda: (nullcontext(), context())}
    return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False, **more)
