"""Rules about balance losses and controllers: what is common to all; what one refuses stands beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetrain.config.rules import at_least
from moetrain.config.schema import TrainConfig
from moetrain.errors import UserError

if TYPE_CHECKING:
    from moetrain.moe.routers import RouterSpec


def balance_numbers(cfg: TrainConfig, world: int) -> None:
    for i, loss in enumerate(cfg.balance.losses):
        at_least(f"balance.losses.{i}", loss, 0, "coef", "final_coef", "final_step")


def balance_is_accepted(cfg: TrainConfig, world: int) -> None:
    """Names, scopes and options, as each loss and controller has them."""
    from moetrain.moe.balance import chosen_controllers, make_terms

    try:
        chosen_controllers(cfg.balance.controllers, make_terms(cfg.balance.losses))
    except ValueError as error:
        raise UserError(f"balance.{error}") from None


def router_has_the_losses(cfg: TrainConfig, world: int) -> None:
    from moetrain.moe.routers import ROUTERS

    if cfg.model.num_experts:
        refuse_losses(cfg, ROUTERS[cfg.router.name], "")


def refuse_losses(cfg: TrainConfig, router: RouterSpec, where: str) -> None:
    """UserError where a loss is none that this router can have; ``where`` names its layer."""
    from moetrain.moe.balance import make_terms

    for term in make_terms(cfg.balance.losses):
        if problem := term.spec.refuses(router):
            raise UserError(f"{where}router={router.name} {problem}")


RULES = (balance_numbers, balance_is_accepted, router_has_the_losses)
