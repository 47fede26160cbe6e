"""Optimizers from their configuration: which parameter gets which rule, weight decay and learning rate."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from moetrain.errors import UserError
from moetrain.ops.held import is_held
from moetrain.ops.rows import is_row_table
from moetrain.train.optim.adamw_8bit import AdamW8bit
from moetrain.train.optim.muon import MATRIX_DIMS, Muon, matrix_shape
from moetrain.train.optim.options import AdamW8bitConfig, MuonConfig, OptimConfig, Tables
from moetrain.train.optim.row_wise import RowWise
from moetrain.train.optim.rules import check_optim

Named = tuple[str, nn.Parameter]
MUON, DECAY, NO_DECAY, TABLES = "muon", "decay", "no_decay", "tables"


def build_optimizer(
    model: nn.Module, cfg: OptimConfig, groups: dict[str, list[Named]] | None = None
) -> Optimizer:
    """AdamW, its 8-bit form or Muon over the trainable parameters of ``model``; after ``parallelize``.

    Every group carries ``name`` (muon, decay, no_decay or tables) and ``peak_lr``; :func:`set_lr` follows the
    schedule. Matrices decay, embeddings and router weights too; biases, norms and other vectors do not,
    nor does what holds some of its rows (``ops/held.py``), whatever Muon would take.
    Muon takes the matrices inside ``model.blocks`` except the routers' and tables whose rows are looked up;
    AdamW, with ``adamw_lr``, the rest. ``cfg.tables`` may give such tables one second moment a row.
    ``groups``: those of :func:`group_parameters`, where parameters have lost the shapes that decide them.
    Raises UserError for an impossible value or a model with nothing to train, and where rows are asked for
    of a model without such tables.
    """
    check_optim(cfg)
    by_row = cfg.tables is not Tables.elementwise
    if groups is None:
        groups = group_parameters(model, muon=isinstance(cfg, MuonConfig), tables=by_row)
    check_groups(model, groups)
    if not groups:
        raise UserError("the model has no parameter that requires a gradient: nothing to train")
    if by_row and TABLES not in groups:
        raise UserError(
            f"optim.tables={cfg.tables.name} is of tables whose rows are looked up "
            "(model.feed_forward=peer or pkm), and none is trained: set optim.tables=elementwise"
        )
    lr = cfg.adamw_lr if isinstance(cfg, MuonConfig) else cfg.lr
    adamw_groups = [
        {
            "params": [parameter for _, parameter in groups[name]],
            "name": name,
            "lr": lr,
            "weight_decay": cfg.weight_decay if name == DECAY else 0.0,
        }
        for name in (DECAY, NO_DECAY)
        if name in groups
    ]
    fused = can_fuse(parameter for named in groups.values() for _, parameter in named)
    options: dict[str, Any] = {
        "betas": (float(cfg.betas[0]), float(cfg.betas[1])),
        "eps": cfg.eps,
        "fused": fused,
        "foreach": not fused,
    }
    optimizer: Optimizer | None
    if isinstance(cfg, MuonConfig):
        optimizer = Muon(
            [parameter for _, parameter in groups.get(MUON, [])],
            adamw_groups,
            lr=cfg.lr,
            weight_decay=cfg.weight_decay,
            momentum=cfg.momentum,
            nesterov=cfg.nesterov,
            ns_steps=cfg.ns_steps,
            adamw_options=options,
            name=MUON,
        )
    elif isinstance(cfg, AdamW8bitConfig):
        optimizer = AdamW8bit(*_by_size(adamw_groups, cfg.min_8bit_size), options)
    else:
        optimizer = AdamW(adamw_groups, **options) if adamw_groups else None
    if by_row:
        optimizer = RowWise(
            optimizer,
            [parameter for _, parameter in groups[TABLES]],
            lr=lr,
            weight_decay=cfg.weight_decay,
            betas=options["betas"],
            eps=cfg.eps,
            momentum=cfg.tables is Tables.row_adam,
            name=TABLES,
        )
    assert optimizer is not None  # some group has parameters
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Take the parameters whose names match a pattern (as a shell does) out of training.

    A pattern after ``!`` takes what it matches back; the later of two decides. Call it before
    ``parallelize``. Raises UserError for a pattern that matches none.
    """
    named = dict(model.named_parameters())
    for pattern in patterns:
        matching = fnmatch.filter(named, pattern.removeprefix("!"))
        if not matching:
            raise UserError(
                f"optim.frozen: {pattern} matches no parameter; they are named as {', '.join([*named][:4])}"
            )
        for name in matching:
            named[name].requires_grad_(pattern.startswith("!"))


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Give every group ``factor`` (from ``lr_factor``) times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def group_parameters(model: nn.Module, muon: bool, tables: bool = False) -> dict[str, list[Named]]:
    """Trainable parameters by the name of their group, in the model's order; empty groups are absent.

    ``tables``: those whose rows are looked up are a group of their own.
    """
    routers = [m for m in model.modules() if getattr(m, "is_router", False) is True]
    of_routers = {id(p) for router in routers for p in router.parameters()}
    hidden = {id(p) for p in getattr(model, "blocks", model).parameters()} - of_routers
    groups: dict[str, list[Named]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not _is_matrix(model, name, parameter) or is_held(parameter):
            kind = NO_DECAY
        elif is_row_table(parameter):
            kind = TABLES if tables else DECAY
        elif muon and id(parameter) in hidden and _can_orthogonalize(parameter):
            kind = MUON
        else:
            kind = DECAY
        groups.setdefault(kind, []).append((name, parameter))
    return groups


def check_groups(model: nn.Module, groups: dict[str, list[Named]]) -> None:
    """Raise ValueError naming the trainable parameters that are in no group or in more than one."""
    seen: dict[int, list[str]] = {}
    for group, named in groups.items():
        for _, parameter in named:
            seen.setdefault(id(parameter), []).append(group)
    for name, parameter in model.named_parameters():
        where = seen.get(id(parameter), [])
        if parameter.requires_grad and len(where) != 1:
            raise ValueError(f"parameter {name} is in {len(where)} optimizer groups {where}, not in one")


def _by_size(groups: list[dict[str, Any]], least: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """``groups`` of what has ``least`` elements, on whatever ranks, and of what is smaller.

    What holds some of its rows counts as smaller: rounding may make a moment of zero another one.
    """
    large: list[dict[str, Any]] = []
    small: list[dict[str, Any]] = []
    for group in groups:
        for kind, where in ((True, large), (False, small)):
            own = [p for p in group["params"] if (p.numel() >= least and not is_held(p)) is kind]
            if own:
                where.append({**group, "params": own})
    return large, small


def can_fuse(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether torch's fused AdamW takes all of them: one kernel a group, and fp64 on a CPU too."""
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)


def _is_matrix(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """A stack of biases or norms has two dimensions as well, so names and owners count.

    A module's ``no_matrices`` says that its parameters are none, whatever their shapes.
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    vectors = "bias" in leaf or "Norm" in type(owner).__name__ or getattr(owner, "no_matrices", False)
    return parameter.ndim >= 2 and not vectors


def _can_orthogonalize(parameter: nn.Parameter) -> bool:
    return parameter.ndim in MATRIX_DIMS and min(matrix_shape(parameter)) > 1
