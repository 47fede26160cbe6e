"""Where a rank's tensors lie in the whole: what a checkpoint of any layout asks for.

Under ZeRO-1 and 2 each rank has whole weights, of experts its own block. ``alike`` ranks hold the same
weights: all of the run, or for experts those of one place in their ep groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from moetrain.parallel.mesh import EFSDP, EP
from moetrain.train.deepspeed.experts import is_expert


@dataclass(frozen=True)
class Layout:
    """``ranks``: a mesh of all; ``experts``: the mesh [efsdp, ep], None where experts are not spread."""

    ranks: DeviceMesh
    experts: DeviceMesh | None

    def alike(self, parameter: nn.Parameter) -> dist.ProcessGroup:
        """The ranks that hold the same block of ``parameter``."""
        return self.ranks.get_group() if self._spread(parameter) is None else self._mesh.get_group(EFSDP)

    def as_whole(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """``local``, a tensor as this rank holds ``parameter``, as a part of the whole; memory is shared."""
        if (mesh := self._spread(parameter)) is None:
            return local
        return DTensor.from_local(local.detach(), mesh, [Shard(0)], run_check=False)

    def share(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """This rank's share of ``local``, which all alike ranks hold: a copy of a cut through it."""
        if not local.ndim:
            return local.clone()
        dim = self._cut(parameter)
        group = self.alike(parameter)
        cut = local.chunk(group.size(), dim)
        mine = cut[group.rank()] if group.rank() < len(cut) else local.narrow(dim, 0, 0)
        mesh, placements = self._shared(parameter)
        sizes = [*local.shape]
        if mesh is not self.ranks:
            sizes[0] *= self._mesh.size(1)
        whole = torch.empty(sizes, device="meta")
        shape, stride = whole.shape, whole.stride()
        return DTensor.from_local(
            mine.contiguous().clone(), mesh, placements, run_check=False, shape=shape, stride=stride
        )

    def unshared(self, parameter: nn.Parameter, share: Tensor) -> Tensor:
        """The ``local`` that :meth:`share` was given; all alike ranks ask together."""
        if not isinstance(share, DTensor):
            return share
        mesh, placements = self._shared(parameter)
        return share.redistribute(mesh, [Replicate(), *placements[1:]]).to_local()

    def _spread(self, parameter: nn.Parameter) -> DeviceMesh | None:
        return self._mesh[EP] if is_expert(parameter) else None

    @property
    def _mesh(self) -> DeviceMesh:
        assert self.experts is not None
        return self.experts

    def _cut(self, parameter: nn.Parameter) -> int:
        """The dimension that alike ranks share: not that of the experts, which their group has cut."""
        return 1 if is_expert(parameter) else 0

    def _shared(self, parameter: nn.Parameter) -> tuple[DeviceMesh, list[Placement]]:
        cut = Shard(self._cut(parameter))
        return (self._mesh, [cut, Shard(0)]) if is_expert(parameter) else (self.ranks, [cut])
