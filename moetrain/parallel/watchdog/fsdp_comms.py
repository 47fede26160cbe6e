"""FSDP2's own collectives, each reported to an observer with the name of its module.

The calls are those that FSDP2 makes itself; on a CPU each has finished when it returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moetrain.compat import all_gather_single, reduce_scatter_single
from moetrain.moe.dispatch.collectives import Collective, Observer


def observe_fsdp(
    module: FSDPModule, name: str, replicas: dist.ProcessGroup | None, observer: Observer
) -> None:
    """Report the collectives of ``module`` to ``observer`` as those of ``name``.

    ``replicas``: the ranks that hold the same shards; None: there are none.
    """
    gather: Any = _Gather(name, observer)
    module.set_custom_all_gather(gather)
    reduce: Any = _Reduce(name, observer) if replicas is None else _ReduceThenSum(name, observer, replicas)
    module.set_custom_reduce_scatter(reduce)
    if replicas is not None:
        module.set_all_reduce_hook(reduce.summed)


class _Observed:
    def __init__(self, name: str, observer: Observer) -> None:
        self.name, self.observer = name, observer

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def entering(self, name: str, kind: str, group: dist.ProcessGroup) -> AbstractContextManager[object]:
        return self.observer(Collective(self.name, name, kind, group, (), (), 0))


class _Gather(_Observed):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        with self.entering("weights", "all_gather", group):
            return all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class _Reduce(_Observed):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        with self.entering("gradients", "reduce_scatter", group):
            return reduce_scatter_single(output_tensor, input_tensor, group=group, op=op, async_op=async_op)


class _ReduceThenSum(_Reduce):
    """FSDP2 allocates, reduces among the shards, sums over the replicas, and then calls its hook."""

    def __init__(self, name: str, observer: Observer, replicas: dist.ProcessGroup) -> None:
        super().__init__(name, observer)
        self.replicas = replicas
        self._sum: AbstractContextManager[object] | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._sum is None:
            self._sum = self.entering("gradients of the replicas", "all_reduce", self.replicas)
            self._sum.__enter__()
        return super().allocate(size, dtype=dtype, device=device)

    def summed(self, gradient: Tensor) -> None:
        assert self._sum is not None
        self._sum.__exit__(None, None, None)
        self._sum = None
