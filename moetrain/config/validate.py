"""Cross-field rules, checked before anything is built or written: ``validate`` runs them all.

One function per rule. Each raises UserError with the key, both numbers and what to do.
"""

from __future__ import annotations

from moetrain.config import rules_data, rules_dispatch, rules_model, rules_train
from moetrain.config.schema import GenerateConfig, TrainConfig


def validate(cfg: TrainConfig, world: int = 1) -> list[str]:
    """Check ``cfg`` for ``world`` ranks; returns warnings, raises UserError for the first broken rule."""
    for rules in (rules_model, rules_data, rules_train, rules_dispatch):
        for rule in rules.RULES:
            rule(cfg, world)
    warnings = (*rules_model.WARNINGS, *rules_train.WARNINGS)
    return [text for warn in warnings if (text := warn(cfg)) is not None]


def validate_generate(cfg: GenerateConfig) -> None:
    """Check what ``moetrain generate`` was told; raises UserError for the first broken rule."""
    for rule in rules_train.GENERATE_RULES:
        rule(cfg)
