"""Device meshes: the layout of the ranks. Dimensions are looked up by name, never by index.

Two meshes lie over the same ranks: ``dense`` [dp_replicate, dp_shard] carries every ordinary parameter,
``sparse`` [dp_replicate, efsdp, ep] the experts, with dp_shard = efsdp * ep: expert parallelism borrows
data-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moetrain.parallel.options import ExpertDispatch, ParallelConfig
from moetrain.parallel.rules import check_layout, ranks_per_node

REPLICATE, SHARD = "dp_replicate", "dp_shard"
EFSDP, EP = "efsdp", "ep"
NODE, PLACE = "ep_node", "ep_place"


@dataclass(frozen=True)
class DataGroups:
    """The groups of ranks by their use of data; None: all ranks, if every axis of the layout splits samples.

    batch  the ranks that read different samples.
    loss   the ranks whose tokens are summed: counts, losses, load, metrics, and what routers couple.
    """

    batch: dist.ProcessGroup | None = None
    loss: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Meshes:
    """The layout of one run; ``dense`` and ``sparse`` are None where there is nothing to lay out."""

    dp_replicate: int = 1
    dp_shard: int = 1
    ep: int = 1
    dense: DeviceMesh | None = None
    sparse: DeviceMesh | None = None  # built with expert parallelism; None while ep is 1
    levels: DeviceMesh | None = None  # an ep group's [ep_node, ep_place]; built for hierarchical dispatch
    cfg: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataGroups = field(default_factory=DataGroups)

    @property
    def world(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp(self) -> DeviceMesh | None:
        """The mesh for FSDP2: 1-D to shard, 2-D to shard inside and replicate across (HSDP)."""
        if self.dense is None:
            return None
        return self.dense if self.dp_replicate > 1 else self.dense[SHARD]

    @property
    def experts_fsdp(self) -> DeviceMesh | None:
        """The mesh for FSDP2 of experts, which ep has spread already; None without ep."""
        if self.sparse is None:
            return None
        return self.sparse[REPLICATE, EFSDP] if self.dp_replicate > 1 else self.sparse[EFSDP]


def build_meshes(cfg: ParallelConfig, world: int, device_type: str = "cpu") -> Meshes:
    """The meshes of ``world`` ranks by ``cfg``. A dp_shard that is not set takes all ranks that are left.

    Needs the process group when ``world`` > 1. Raises UserError for what is no layout of ``world`` ranks
    (:func:`~moetrain.parallel.rules.check_layout`).
    """
    check_layout(cfg, world)
    shard = world // cfg.dp_replicate if cfg.dp_shard is None else cfg.dp_shard
    dense = sparse = None
    if world > 1:
        dense = init_device_mesh(device_type, (cfg.dp_replicate, shard), mesh_dim_names=(REPLICATE, SHARD))
    if cfg.ep > 1:
        sizes = (cfg.dp_replicate, shard // cfg.ep, cfg.ep)
        sparse = init_device_mesh(device_type, sizes, mesh_dim_names=(REPLICATE, EFSDP, EP))
    levels = build_levels(cfg, world, device_type) if cfg.ep > 1 else None
    return Meshes(cfg.dp_replicate, shard, cfg.ep, dense, sparse, levels, cfg)


def build_levels(cfg: ParallelConfig, world: int, device_type: str) -> DeviceMesh | None:
    """The [ep_group, ep_node, ep_place] mesh of hierarchical dispatch; None for any other."""
    if cfg.dispatcher is not ExpertDispatch.hierarchical:
        return None
    places = min(ranks_per_node(cfg), cfg.ep)
    sizes = (world // cfg.ep, cfg.ep // places, places)
    return init_device_mesh(device_type, sizes, mesh_dim_names=("ep_group", NODE, PLACE))
