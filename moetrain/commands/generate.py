"""``moetrain generate``: text from a trained model."""

from __future__ import annotations

from moetrain.commands.composed import composed
from moetrain.config.validate import validate_generate
from moetrain.train.options import GenerateConfig


def run(args: list[str]) -> int:
    cfg = composed("generate", GenerateConfig, args)
    if cfg is None:
        return 0
    validate_generate(cfg)
    from moetrain.config.stored import trained_config
    from moetrain.train.sample import generate_app

    return generate_app(cfg, trained_config)
