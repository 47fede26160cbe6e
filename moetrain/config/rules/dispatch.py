"""Rules about how rows travel between the ranks of expert parallelism."""

from __future__ import annotations

from moetrain.errors import UserError
from moetrain.parallel.options import ExpertDispatch
from moetrain.train.options import TrainConfig


def overlap_has_chunks(cfg: TrainConfig, world: int) -> None:
    p = cfg.parallel
    if p.overlap == 1:
        return
    if p.dispatcher is not ExpertDispatch.all_to_all:
        raise UserError(
            f"parallel.overlap={p.overlap} is of parallel.dispatcher=all_to_all, not of {p.dispatcher.name}: "
            "set parallel.overlap=1 or parallel.dispatcher=all_to_all"
        )
    if p.ep == 1:
        raise UserError(f"parallel.overlap={p.overlap} needs parallel.ep above 1: set parallel.overlap=1")
    if p.overlap > (here := cfg.model.num_experts // p.ep):
        raise UserError(
            f"parallel.overlap={p.overlap} chunks of whole experts, but model.num_experts="
            f"{cfg.model.num_experts} / parallel.ep={p.ep} leaves {here} a rank: set parallel.overlap to "
            f"{here} or less"
        )


def nodes_hold_whole_groups(cfg: TrainConfig, world: int) -> None:
    """An ep group is whole nodes, or lies inside one, where the hierarchical dispatcher finds one level."""
    from moetrain.parallel.mesh import ranks_per_node

    p = cfg.parallel
    if p.dispatcher is not ExpertDispatch.hierarchical:
        if not p.node_sums:
            raise UserError(
                "parallel.node_sums=false is of parallel.dispatcher=hierarchical, not of "
                f"{p.dispatcher.name}: set parallel.node_sums=true"
            )
        return
    size = ranks_per_node(p)
    if p.ep % size and size % p.ep:
        given = "" if p.ranks_per_node else " (LOCAL_WORLD_SIZE)"
        raise UserError(
            f"parallel.ranks_per_node={size}{given} and parallel.ep={p.ep}: one must divide the other, so "
            "that an ep group is whole nodes or lies inside one; parallel.dispatcher=all_to_all needs neither"
        )


RULES = (overlap_has_chunks, nodes_hold_whole_groups)
