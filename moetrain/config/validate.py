"""Cross-field rules, checked before anything is built or written: ``validate`` runs them all.

One function per rule. Each raises UserError with the key, both numbers and what to do.
"""

from __future__ import annotations

from moetrain.bounds import check_ranges
from moetrain.config.rules import (
    balance,
    data,
    dispatch,
    eval,
    layers,
    model,
    rope,
    train,
)
from moetrain.convert.options import ExportConfig, UpcycleConfig
from moetrain.errors import UserError
from moetrain.evaluation.options import EvalConfig
from moetrain.parallel.options import ParallelConfig
from moetrain.train.options import GenerateConfig, TrainConfig
from moetrain.verify.options import VerifyConfig


def validate(cfg: TrainConfig, world: int = 1) -> list[str]:
    """Check ``cfg`` for ``world`` ranks; returns warnings, raises UserError for the first broken rule."""
    check_ranges(cfg)
    for rules in (model, balance, layers, rope, data, train, dispatch):
        for rule in rules.RULES:
            rule(cfg, world)
    warnings = (*model.WARNINGS, *train.WARNINGS)
    return [text for warn in warnings if (text := warn(cfg)) is not None]


def validate_verify(cfg: VerifyConfig) -> None:
    """Check a layout that is to be proved, for the ranks it is meant for."""
    check_ranges(cfg)
    if cfg.router.group == "all" and any(loss.scope.name == "micro" for loss in cfg.balance.losses):
        raise UserError(
            "router.group=all couples all ranks, and a loss of scope=micro tells them apart: no single "
            "process does the same; take another scope"
        )
    rules = (*model.RULES, *balance.RULES, *layers.RULES, *rope.RULES)
    for rule in (*rules, *train.LAYOUT_RULES, *dispatch.RULES):
        rule(cfg, cfg.verify.world or smallest_world(cfg.parallel))


def validate_upcycle(cfg: UpcycleConfig) -> None:
    """Check the model that is to be made, and the text; raises UserError for the first broken rule."""
    check_ranges(cfg)
    models = (*layers.UPCYCLE_RULES, *model.RULES, *balance.RULES)
    for rule in (*models, *data.RULES):
        rule(cfg, 1)


def validate_stored(cfg: TrainConfig, where: str) -> None:
    """Check what a stored config says of its model and its text; ``where`` names the file."""
    try:
        for section in ("model", "router", "experts", "data"):
            check_ranges(getattr(cfg, section), section)
        for rule in (*model.STORED_RULES, *layers.RULES, *rope.RULES):
            rule(cfg, 1)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def validate_generate(cfg: GenerateConfig) -> None:
    """Check what ``moetrain generate`` was told; raises UserError for the first broken rule."""
    check_ranges(cfg)
    for rule in train.GENERATE_RULES:
        rule(cfg)


def validate_eval(cfg: EvalConfig) -> None:
    """Check what ``moetrain eval`` was told; raises UserError for the first broken rule."""
    check_ranges(cfg)
    for rule in eval.RULES:
        rule(cfg)


def validate_export(cfg: ExportConfig) -> None:
    """Check what ``moetrain export`` was told; raises UserError for the first broken rule."""
    check_ranges(cfg)


def smallest_world(parallel: ParallelConfig) -> int:
    """The fewest ranks that such a layout can have, two at least."""
    shard = parallel.ep if parallel.dp_shard is None else parallel.dp_shard
    return max(2, parallel.dp_replicate * shard)
