"""``moetrain train``: one run, a comparison of arms, or a sweep.

A single run is composed here and handed over as a frozen object; nothing is written before it is valid.
"""

from __future__ import annotations

from moetrain.config.hydra.compose import compose_arms, compose_train
from moetrain.config.hydra.flags import parse_flags
from moetrain.config.hydra.overrides import refuse_hydra
from moetrain.config.pages import print_page
from moetrain.config.validate import validate
from moetrain.errors import UserError
from moetrain.parallel.cores import choose_waiting
from moetrain.parallel.environment import is_rank_0, local_ranks, stopped, world_size
from moetrain.train.options import TrainConfig


def run(args: list[str]) -> int:
    choose_waiting(local_ranks())  # before torch is imported
    flags = parse_flags("train", args)
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


def _compare(cfg: TrainConfig, arms: dict[str, TrainConfig]) -> int:
    for name, arm in arms.items():
        try:
            validate(arm, world_size())
        except UserError as e:
            raise UserError(f"compare.arms.{name}: {e}") from e
    from moetrain.train.compare import compare

    return compare(cfg, arms)
