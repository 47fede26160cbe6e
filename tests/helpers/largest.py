"""The largest tensor that any operator makes meanwhile, in elements."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """``numel``: of tensors with memory of their own; views, and what is written in place, make none."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if all(value.alias_info is None for value in func._schema.returns):
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor) and _holds_numbers(leaf):
                    self.numel = max(self.numel, leaf.numel())
        return out


def _holds_numbers(tensor: Tensor) -> bool:
    """Bytes are messages between ranks."""
    return tensor.is_floating_point() and not tensor.is_meta
