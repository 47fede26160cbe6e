"""``moetrain train``: one run, a comparison of arms, or a sweep.

A single run is composed here and handed over as a frozen object; nothing is written before it is valid.
"""

from __future__ import annotations

from moetrain.config.checked import checked, checked_arms
from moetrain.config.hydra.compose import load_yaml
from moetrain.config.hydra.flags import parse_flags
from moetrain.config.hydra.overrides import refuse_hydra
from moetrain.config.pages import print_page
from moetrain.parallel.environment import is_rank_0, stopped, world_size
from moetrain.train.options import TrainConfig


def run(args: list[str]) -> int:
    flags = parse_flags("train", args)
    if flags.page:
        return print_page(TrainConfig, "train", flags)
    if flags.multirun:
        from moetrain.config.hydra.sweep import sweep

        refuse_hydra(flags.overrides, sweep=True)
        return sweep(flags)
    refuse_hydra(flags.overrides, sweep=False)
    world, files = world_size(), (flags.config_name, flags.config_dir)
    cfg, notes = checked(flags.overrides, world, *files)
    if cfg.compare.arms:
        arms = checked_arms(cfg, flags.overrides, world, *files)
        from moetrain.train.compare import compare

        return compare(cfg, arms, load_yaml)
    from moetrain.train.run import train
    from moetrain.verify.certificate import certificate_line

    if world > 1 and is_rank_0():
        notes = [*notes, certificate_line(cfg, world)]
    return 0 if train(cfg, load_yaml, notes) else stopped()
