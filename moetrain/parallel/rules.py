"""What a layout refuses of its settings: how they fit the ranks, one another, and the experts of a model."""

from __future__ import annotations

from moetrain.bounds import check_ranges
from moetrain.errors import UserError
from moetrain.parallel.distributed import local_world
from moetrain.parallel.options import ExpertDispatch, ParallelConfig


def check_layout(cfg: ParallelConfig, world: int, num_experts: int | None = None) -> None:
    """Raise UserError where ``cfg`` is no layout of ``world`` ranks, or not of ``num_experts``, if given."""
    check_ranges(cfg, "parallel")
    _fills_world(cfg, world)
    if num_experts is not None:
        _spreads(cfg, num_experts)
    _borrows_whole_ranks(cfg, world)
    _overlaps(cfg, num_experts)
    _has_whole_nodes(cfg)


def check_layer(cfg: ParallelConfig, experts: int, where: str, sliced: bool = False) -> None:
    """Raise UserError where the ranks of ``ep`` cannot share a layer's ``experts``; ``where`` names it.

    ``sliced``: they are slices of experts of different widths.
    """
    what = "slices of its experts' widths" if sliced else "experts"
    if experts % cfg.ep:
        raise UserError(f"{where} has {experts} {what}, which parallel.ep={cfg.ep} does not divide")
    if cfg.overlap > (here := experts // cfg.ep):
        raise UserError(
            f"{where} has {experts} {what}, {here} a rank, fewer than the chunks of "
            f"parallel.overlap={cfg.overlap}: lower it"
        )


def ranks_per_node(cfg: ParallelConfig) -> int:
    """The number of consecutive ranks that share a machine."""
    return local_world() if cfg.ranks_per_node is None else cfg.ranks_per_node


def _fills_world(cfg: ParallelConfig, world: int) -> None:
    replicate, shard = cfg.dp_replicate, cfg.dp_shard
    if shard is None and world % replicate:
        raise UserError(f"parallel.dp_replicate={replicate} does not divide the {world} ranks of this run")
    if shard is not None and replicate * shard != world:
        raise UserError(
            f"parallel.dp_replicate={replicate} times parallel.dp_shard={shard} is {replicate * shard}, "
            f"but this run has {world} ranks: set parallel.dp_shard=null to fill them, "
            "or start torchrun with as many"
        )


def _spreads(cfg: ParallelConfig, num_experts: int) -> None:
    if cfg.ep == 1:
        return
    if not num_experts:
        raise UserError(f"parallel.ep={cfg.ep} needs experts, but model.num_experts=0: set parallel.ep=1")
    if num_experts % cfg.ep:
        raise UserError(f"parallel.ep={cfg.ep} does not divide model.num_experts={num_experts}")


def _borrows_whole_ranks(cfg: ParallelConfig, world: int) -> None:
    shard = world // cfg.dp_replicate if cfg.dp_shard is None else cfg.dp_shard
    if shard % cfg.ep:
        raise UserError(
            f"parallel.ep={cfg.ep} borrows ranks of parallel.dp_shard, but does not divide its {shard}: "
            f"start a multiple of {cfg.ep * cfg.dp_replicate} ranks"
        )


def _overlaps(cfg: ParallelConfig, num_experts: int | None) -> None:
    """A chunk is of whole experts."""
    if cfg.overlap == 1:
        return
    if cfg.dispatcher is not ExpertDispatch.all_to_all:
        raise UserError(
            f"parallel.overlap={cfg.overlap} is of parallel.dispatcher=all_to_all, not of "
            f"{cfg.dispatcher.name}: set parallel.overlap=1 or parallel.dispatcher=all_to_all"
        )
    if cfg.ep == 1:
        raise UserError(f"parallel.overlap={cfg.overlap} needs parallel.ep above 1: set parallel.overlap=1")
    if num_experts is not None and cfg.overlap > (here := num_experts // cfg.ep):
        raise UserError(
            f"parallel.overlap={cfg.overlap} chunks of whole experts, but model.num_experts="
            f"{num_experts} / parallel.ep={cfg.ep} leaves {here} a rank: set parallel.overlap to "
            f"{here} or less"
        )


def _has_whole_nodes(cfg: ParallelConfig) -> None:
    """An ep group is whole nodes, or lies inside one, where the hierarchical dispatcher finds one level."""
    if cfg.dispatcher is not ExpertDispatch.hierarchical:
        if not cfg.node_sums:
            raise UserError(
                "parallel.node_sums=false is of parallel.dispatcher=hierarchical, not of "
                f"{cfg.dispatcher.name}: set parallel.node_sums=true"
            )
        return
    size = ranks_per_node(cfg)
    if cfg.ep % size and size % cfg.ep:
        given = "" if cfg.ranks_per_node else " (LOCAL_WORLD_SIZE)"
        raise UserError(
            f"parallel.ranks_per_node={size}{given} and parallel.ep={cfg.ep}: one must divide the other, so "
            "that an ep group is whole nodes or lies inside one; parallel.dispatcher=all_to_all needs neither"
        )
