"""Rules that the chosen router's own facts decide: options that it refuses, settings that it never reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetrain.config.schema import TrainConfig
from moetrain.config.schema_balance import LossName
from moetrain.errors import UserError

if TYPE_CHECKING:
    from moetrain.moe.routers import Router

_OF_LOGITS = (LossName.z, LossName.locality)  # all others but penalty are of scores


def router_accepts_its_options(cfg: TrainConfig, world: int) -> None:
    """Whatever the router itself refuses. A plugin's rules live there."""
    if cfg.model.num_experts:
        _router(cfg)


def router_has_what_losses_need(cfg: TrainConfig, world: int) -> None:
    if not (cfg.model.num_experts and cfg.balance.losses):
        return
    router, name = _router(cfg), cfg.router.name
    for i, loss in enumerate(cfg.balance.losses):
        here = f"balance.losses.{i}.name={loss.name.value}"
        if loss.name is LossName.penalty:
            if not router.has_penalty:
                raise UserError(f"router={name} has no loss of its own: take {here} out")
        elif loss.name in _OF_LOGITS:
            if not router.has_logits:
                raise UserError(f"router={name} returns no logits, which {here} is of: take balance=none")
        elif not router.has_scores:
            raise UserError(f"router={name} returns no scores, which {here} is of: take balance=none")


def router_follows_controllers(cfg: TrainConfig, world: int) -> None:
    """A controller whose work the router never reads would seem to have an effect."""
    from moetrain.moe.routers import ROUTERS

    rates = cfg.balance
    if not (cfg.model.num_experts and (rates.bias_rate or rates.sparsity_rate)):
        return
    router, name = _router(cfg), cfg.router.name
    if rates.bias_rate and not router.reads_bias:
        known = sorted(n for n, spec in ROUTERS.items() if spec.cls.reads_bias)
        raise UserError(
            f"balance.bias_rate={rates.bias_rate} moves a bias that router={name} never reads: set "
            f"balance.bias_rate=0, or take a router that does: {', '.join(known)}"
        )
    if rates.sparsity_rate and router.target_k is None:
        raise UserError(
            f"balance.sparsity_rate={rates.sparsity_rate} aims at a mean number of experts a token, which "
            f"router={name} does not have: set balance.sparsity_rate=0, or router=relu"
        )
    names = [loss.name.value for loss in rates.losses]
    if rates.sparsity_rate and "l1" not in names:
        raise UserError(
            f"balance.sparsity_rate={rates.sparsity_rate} is not used by balance.losses={names}: "
            "leave it out, or add l1 to them"
        )


def _router(cfg: TrainConfig) -> Router:
    """It is built without memory. Raises UserError with what the router says of its options."""
    import torch

    from moetrain.moe.routers import build_router

    model = cfg.model
    try:
        with torch.device("meta"):
            return build_router(
                cfg.router.name, d_model=model.d_model, num_experts=model.num_experts, options=cfg.router
            )
    except ValueError as e:
        raise UserError(f"router={cfg.router.name}: {e}") from e
