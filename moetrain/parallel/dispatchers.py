"""The dispatcher of a layer whose experts are spread over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moetrain.moe.dispatch import Dispatcher
from moetrain.moe.dispatch.all_gather import AllGatherDispatcher
from moetrain.moe.dispatch.all_to_all import AllToAllDispatcher
from moetrain.moe.dispatch.collectives import Exchange
from moetrain.moe.dispatch.hierarchical import HierarchicalDispatcher
from moetrain.moe.dispatch.placement import Placement
from moetrain.parallel.mesh import NODE, PLACE, Meshes
from moetrain.parallel.options import ExpertDispatch


def build_dispatcher(
    meshes: Meshes, exchange: Exchange, placement: Placement, device: torch.device, block: int | None
) -> Dispatcher:
    """The dispatcher that ``meshes.cfg`` names, over the ranks of ``exchange``, which are an ep group.

    All ranks of the run make equally many rounds, since they gather sharded experts together.
    """
    cfg, everyone = meshes.cfg, dist.group.WORLD
    if cfg.dispatcher is ExpertDispatch.all_gather:
        return AllGatherDispatcher(exchange, placement, device, block, everyone)
    if cfg.dispatcher is ExpertDispatch.all_to_all:
        return AllToAllDispatcher(exchange, placement, device, block, everyone, cfg.overlap)
    assert meshes.levels is not None
    assert everyone is not None
    nodes, node = (exchange.over(meshes.levels[name].get_group()) for name in (NODE, PLACE))
    return HierarchicalDispatcher(nodes, node, everyone, placement, device, block, cfg.node_sums)
