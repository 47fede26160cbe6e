"""The Hydra commands: ``moetrain train``, ``verify``, ``generate``, ``eval``, ``convert`` and their like.

A single run is composed here and handed over as a frozen object; nothing is written before it is valid.
Sweeps (``sweep.py``) and printed pages (``pages.py``) go through ``hydra.main``.
"""

from __future__ import annotations

from typing import TypeVar

from moetrain.config.hydra.compose import compose_app, compose_arms, compose_train
from moetrain.config.hydra.flags import parse_flags
from moetrain.config.hydra.overrides import refuse_hydra
from moetrain.config.launch import is_rank_0, stopped, world_size
from moetrain.config.pages import print_page
from moetrain.config.validate import (
    validate,
    validate_eval,
    validate_export,
    validate_generate,
    validate_upcycle,
    validate_verify,
)
from moetrain.convert.options import ConvertConfig, ExportConfig, UpcycleConfig
from moetrain.errors import UserError
from moetrain.evaluation.options import EvalConfig
from moetrain.train.options import GenerateConfig, TrainConfig
from moetrain.verify.options import VerifyConfig

T = TypeVar("T")


def train_command(argv: list[str]) -> int:
    """``moetrain train ...``; returns the exit code. Raises UserError for what the user can mend."""
    flags = parse_flags("train", argv)
    if flags.page:
        return print_page(TrainConfig, "train", flags)
    if flags.multirun:
        from moetrain.config.hydra.sweep import sweep

        refuse_hydra(flags.overrides, sweep=True)
        return sweep(flags)
    refuse_hydra(flags.overrides, sweep=False)
    cfg = compose_train(flags.overrides, flags.config_name, flags.config_dir)
    validate(cfg, world_size())
    if cfg.compare.arms:
        return _compare(cfg, compose_arms(cfg, flags.overrides, flags.config_name, flags.config_dir))
    from moetrain.train.run import train
    from moetrain.verify.certificate import certificate_line

    world = world_size()
    finished = train(cfg, [certificate_line(cfg, world)] if world > 1 and is_rank_0() else [])
    return 0 if finished else stopped()


def verify_command(argv: list[str]) -> int:
    """``moetrain verify ...``; returns the exit code. Raises UserError for what the user can mend."""
    cfg = _composed("verify", VerifyConfig, argv)
    if cfg is None:
        return 0
    if world_size() > 1:
        raise UserError(
            f"verify starts its own ranks, but WORLD_SIZE={world_size()}: run it without torchrun"
        )
    validate_verify(cfg)
    from moetrain.verify.command import verify

    return verify(cfg)


def generate_command(argv: list[str]) -> int:
    """``moetrain generate ...``; returns the exit code. Raises UserError for what the user can mend."""
    cfg = _composed("generate", GenerateConfig, argv)
    if cfg is None:
        return 0
    validate_generate(cfg)
    from moetrain.train.sample import generate_app

    return generate_app(cfg)


def eval_command(argv: list[str]) -> int:
    """``moetrain eval ...``; returns the exit code. Raises UserError for what the user can mend."""
    cfg = _composed("eval", EvalConfig, argv)
    if cfg is None:
        return 0
    if world_size() > 1:
        raise UserError(f"eval runs in one process, but WORLD_SIZE={world_size()}: run it without torchrun")
    validate_eval(cfg)
    from moetrain.evaluation.command import eval_app

    return eval_app(cfg)


def convert_command(argv: list[str]) -> int:
    """``moetrain convert ...``; returns the exit code. Raises UserError for what the user can mend."""
    cfg = _composed("convert", ConvertConfig, argv)
    if cfg is None:
        return 0
    from moetrain.convert.importing import convert

    return convert(cfg)


def export_command(argv: list[str]) -> int:
    """``moetrain export ...``; returns the exit code. Raises UserError for what the user can mend."""
    cfg = _composed("export", ExportConfig, argv)
    if cfg is None:
        return 0
    validate_export(cfg)
    from moetrain.convert.exporting import export

    return export(cfg)


def upcycle_command(argv: list[str]) -> int:
    """``moetrain upcycle ...``; returns the exit code. Raises UserError for what the user can mend."""
    cfg = _composed("upcycle", UpcycleConfig, argv)
    if cfg is None:
        return 0
    validate_upcycle(cfg)
    from moetrain.convert.upcycling import upcycle

    return upcycle(cfg)


def _composed(command: str, root: type[T], argv: list[str]) -> T | None:
    """The config of a command without sweeps; None where a page was asked for and printed."""
    flags = parse_flags(command, argv)
    if flags.page:
        print_page(root, command, flags)
        return None
    if flags.multirun:
        raise UserError(f"-m: {command} has no sweeps; train has")
    refuse_hydra(flags.overrides, sweep=False)
    return compose_app(root, flags.config_name, flags.overrides, flags.config_dir)


def _compare(cfg: TrainConfig, arms: dict[str, TrainConfig]) -> int:
    for name, arm in arms.items():
        try:
            validate(arm, world_size())
        except UserError as e:
            raise UserError(f"compare.arms.{name}: {e}") from e
    from moetrain.train.compare import compare

    return compare(cfg, arms)
