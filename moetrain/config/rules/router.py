"""The rule that the chosen router itself decides: options that it refuses."""

from __future__ import annotations

import torch

from moetrain.errors import UserError
from moetrain.moe.routers import ROUTERS, Router, build_router
from moetrain.train.options import TrainConfig
from moetrain.train.routes import replay_refusal


def router_accepts_its_options(cfg: TrainConfig) -> None:
    """Whatever the router itself refuses. A plugin's rules live there."""
    if cfg.model.num_experts:
        built_router(cfg)


def router_can_be_replayed(cfg: TrainConfig) -> None:
    """A record needs a router that takes the experts it is given, and all that it chooses."""
    if cfg.replay.record is None and cfg.replay.force is None:
        return
    if cfg.compare.arms and cfg.replay.record is not None:
        raise UserError(f"replay.record={cfg.replay.record} is one run's, and compare.arms are several runs")
    if line := replay_refusal({0: built_router(cfg)} if cfg.model.num_experts else {}):
        raise UserError(line)


def router_has_its_task(cfg: TrainConfig) -> str | None:
    """A warning where the router's paper trains it by another task; None where it fits."""
    task = ROUTERS[cfg.router.name].cls.task if cfg.model.num_experts else None
    if task in (None, cfg.train.task):
        return None
    return (
        f"router={cfg.router.name} is trained by train.task={task} in its paper: train.task={cfg.train.task} "
        "leaves what that task adds out"
    )


def built_router(cfg: TrainConfig) -> Router:
    """It is built without memory. Raises UserError with what the router says of its options."""
    model = cfg.model
    try:
        with torch.device("meta"):
            return build_router(
                cfg.router.name, d_model=model.d_model, num_experts=model.num_experts, options=cfg.router
            )
    except ValueError as e:
        raise UserError(f"router={cfg.router.name}: {e}") from e
