"""Low-rank products beside the matrices of a decoder's blocks, as ``model.lora`` says.

A module that reads products names its matrices in ``takes_low_rank``. Any other finds the sum of its matrix
and the product while it runs, whatever it computes with it: routers, and attention of other kinds.

Shapes: N rows and K columns of a matrix, E experts.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from moetrain.errors import UserError
from moetrain.models.lora_options import LoraConfig, split_target
from moetrain.moe import MoELayer
from moetrain.moe.experts import Experts, ExpertsModule
from moetrain.moe.low_rank_experts import LowRankLayer
from moetrain.moe.mlp import MATRICES
from moetrain.moe.rules import dropout_refusal
from moetrain.ops.held import is_held
from moetrain.ops.low_rank import PREFIX, Draw, LowRank, StackedLowRank, sum_while_running

KEY = "model.lora"


def add_low_rank(blocks: nn.ModuleList, cfg: LoraConfig) -> None:
    """Make the products that ``cfg`` names, in place.

    Raises UserError for a target that names no matrix, or one whose module cannot have a product.
    """
    if cfg.rank is None:
        return
    matrices = _matrices(blocks)
    _check_targets(cfg, matrices)
    for name, (owner, leaf, matrix) in matrices.items():
        rank = cfg.rank_of(name)
        if rank is None:
            continue
        if is_held(matrix):
            raise UserError(
                f"{KEY}.targets: {name} has rows that stay as they are (experts.frozen, router.held), "
                "which a product would change: leave it out, or hold none"
            )
        if line := _refusal(owner, leaf, matrix.ndim, cfg):
            raise UserError(f"{KEY}.targets: {name} {line}")
        if (of := _of_experts(owner, leaf, matrix)) is not None:
            experts, columns, inner = of
            stacked = StackedLowRank(experts.num_experts, columns, inner, rank, cfg.factor(rank))
            experts.add_module(PREFIX + leaf, stacked)
            experts.dropout = replace(experts.dropout, beside=cfg.dropout)
            continue
        salt = zlib.crc32(name.partition(".")[2].partition(".")[2].encode())  # alike in all layers
        rows, columns = matrix.shape
        added = LowRank(rows, columns, rank, cfg.factor(rank), cfg.dropout, salt)
        owner.add_module(PREFIX + leaf, added)
        if leaf not in _taken(owner):
            sum_while_running(owner, leaf, added)
    for name, layer in blocks.named_modules():
        if isinstance(layer, LowRankLayer) and not any(map(layer.experts.added, MATRICES)):
            raise UserError(
                f"{KEY}.targets: none matches a matrix of blocks.{name}, whose experts would all be alike "
                "(experts.kind=low_rank): add '*.feed_forward.w_*'"
            )


def draw_by(block: nn.Module, draw: Draw) -> None:
    """Give the products in ``block`` the noise of the pass to come, by which they drop."""
    for module in block.modules():
        if isinstance(module, LowRank):
            module.draw = draw


def _matrices(blocks: nn.ModuleList) -> dict[str, tuple[nn.Module, str, nn.Parameter]]:
    """By name: the module, its name for the matrix, and the matrix. Experts' stacked biases are none."""
    found = {}
    for name, parameter in blocks.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner = blocks.get_submodule(path)
        is_bias = isinstance(owner, Experts) and leaf not in owner.takes_low_rank
        if parameter.ndim > 1 and not is_bias:
            found[f"blocks.{name}"] = (owner, leaf, parameter)
    return found


def _of_experts(
    owner: nn.Module, leaf: str, matrix: nn.Parameter
) -> tuple[ExpertsModule, int, tuple[int, ...]] | None:
    """Where each expert has a product of its own beside ``matrix``: who holds them, and the matrix's
    inner and outer dimensions."""
    if isinstance(owner, Experts):
        _, columns, *inner = matrix.shape
        return owner, columns, tuple(inner)
    if isinstance(owner, LowRankLayer) and leaf in MATRICES:
        rows, columns = matrix.shape
        return owner.experts, columns, (rows,)
    return None


def _taken(owner: nn.Module) -> tuple[str, ...]:
    taken: tuple[str, ...] = getattr(owner, "takes_low_rank", ())
    return taken


def _refusal(owner: nn.Module, leaf: str, ndim: int, cfg: LoraConfig) -> str | None:
    """Why ``owner``'s matrix can have no product, as what follows its name; None where it can."""
    if isinstance(owner, Experts):
        line = dropout_refusal(owner.backend, replace(owner.dropout, beside=cfg.dropout))
        return None if line is None else f"has a product whose input is dropped: {line}"
    if ndim > 2:
        return (
            f"has {ndim} dimensions, and {type(owner).__name__} reads no products beside such: leave it out"
        )
    if leaf in _taken(owner):
        return None
    if isinstance(owner, MoELayer) or hasattr(owner, "feed_forward"):
        return "is read by the layer or the block itself, which takes no product beside it: leave it out"
    if cfg.dropout:
        return (
            f"is read by {type(owner).__name__} as a sum with its product, whose input cannot be dropped "
            f"alone: leave it out, or set {KEY}.dropout=0"
        )
    return None


def _check_targets(cfg: LoraConfig, names: Iterable[str]) -> None:
    """UserError for a pattern without a matrix; of the usual patterns, for all together."""
    unmatched = [t for t in cfg.targets if not any(fnmatchcase(n, split_target(t)[0]) for n in names)]
    usual = cfg.targets == LoraConfig.targets
    if unmatched and (not usual or len(unmatched) == len(cfg.targets)):
        some = ", ".join(list(names)[:4])
        raise UserError(
            f"{KEY}.targets: {unmatched[0]} matches no matrix in a block; they are named as {some}"
        )
