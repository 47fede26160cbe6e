"""Rules about balance losses and controllers, as each has them, and as the chosen router can have them."""

from __future__ import annotations

from collections.abc import Sequence

from moetrain.config.rules.router import built_router
from moetrain.errors import UserError
from moetrain.moe.balance import chosen_controllers, make_terms
from moetrain.moe.balance.rules import controllers_refusal, losses_refusal
from moetrain.moe.balance.settings import BalanceConfig
from moetrain.moe.routers import Router
from moetrain.train.options import TrainConfig

OWN = "moe"  # the layer whose router is what the config says; others are asked one by one (``layers.py``)


def balance_is_accepted(cfg: TrainConfig) -> None:
    """Names, scopes and options, as each loss and controller has them."""
    try:
        chosen_controllers(cfg.balance.controllers, make_terms(cfg.balance.losses))
    except ValueError as error:
        raise UserError(f"balance.{error}") from None


def balance_fits_the_router(cfg: TrainConfig) -> None:
    m = cfg.model
    if m.num_experts and m.feed_forward == OWN and (cfg.balance.losses or cfg.balance.controllers):
        router = built_router(cfg)
        refuse_losses(cfg.balance, router, "")
        refuse_controllers(cfg.balance, [router], "")


def refuse_losses(cfg: BalanceConfig, router: Router, where: str) -> None:
    """UserError where a loss is none that this router can have; ``where`` names its layer."""
    if line := losses_refusal(make_terms(cfg.losses), router):
        raise UserError(f"{where}{line}")


def refuse_controllers(cfg: BalanceConfig, routers: Sequence[Router], where: str) -> None:
    """UserError where a controller is none that any of these routers can have."""
    chosen = chosen_controllers(cfg.controllers, make_terms(cfg.losses))
    if line := controllers_refusal(chosen, routers):
        raise UserError(f"{where}{line}")
