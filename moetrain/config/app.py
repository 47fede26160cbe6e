"""The Hydra commands, ``moetrain train``, ``moetrain verify`` and ``moetrain generate``.

A single run is composed here and handed over as a frozen object; nothing is written before it is valid.
Sweeps (``sweep.py``) and printed pages (``pages.py``) go through ``hydra.main``.
"""

from __future__ import annotations

from moetrain.config.compose import compose_arms, compose_generate, compose_train, compose_verify
from moetrain.config.flags import parse_flags
from moetrain.config.launch import is_rank_0, world_size
from moetrain.config.pages import print_page
from moetrain.config.schema import GenerateConfig, TrainConfig, VerifyConfig
from moetrain.config.validate import validate, validate_generate, validate_verify
from moetrain.errors import UserError


def train_command(argv: list[str]) -> int:
    """``moetrain train ...``; returns the exit code. Raises UserError for what the user can mend."""
    flags = parse_flags("train", argv)
    if flags.page:
        return print_page(TrainConfig, "train", flags)
    if flags.multirun:
        from moetrain.config.sweep import sweep

        return sweep(flags)
    cfg = compose_train(flags.overrides, flags.config_name, flags.config_dir)
    validate(cfg, world_size())
    if cfg.compare.arms:
        return _compare(cfg, compose_arms(cfg, flags.overrides, flags.config_name, flags.config_dir))
    from moetrain.train.run import train
    from moetrain.verify.certificate import certificate_line

    world = world_size()
    return train(cfg, [certificate_line(cfg, world)] if world > 1 and is_rank_0() else [])


def verify_command(argv: list[str]) -> int:
    """``moetrain verify ...``; returns the exit code. Raises UserError for what the user can mend."""
    flags = parse_flags("verify", argv)
    if flags.page:
        return print_page(VerifyConfig, "verify", flags)
    if flags.multirun:
        raise UserError("-m: verify has no sweeps; train has")
    if world_size() > 1:
        raise UserError(
            f"verify starts its own ranks, but WORLD_SIZE={world_size()}: run it without torchrun"
        )
    cfg = compose_verify(flags.overrides, flags.config_name, flags.config_dir)
    validate_verify(cfg)
    from moetrain.verify.command import verify

    return verify(cfg)


def generate_command(argv: list[str]) -> int:
    """``moetrain generate ...``; returns the exit code. Raises UserError for what the user can mend."""
    flags = parse_flags("generate", argv)
    if flags.page:
        return print_page(GenerateConfig, "generate", flags)
    if flags.multirun:
        raise UserError("-m: generate has no sweeps; train has")
    cfg = compose_generate(flags.overrides, flags.config_name, flags.config_dir)
    validate_generate(cfg)
    from moetrain.train.sample import generate_app

    return generate_app(cfg)


def _compare(cfg: TrainConfig, arms: dict[str, TrainConfig]) -> int:
    for name, arm in arms.items():
        try:
            validate(arm, world_size())
        except UserError as e:
            raise UserError(f"compare.arms.{name}: {e}") from e
    from moetrain.train.compare import compare

    return compare(cfg, arms)
