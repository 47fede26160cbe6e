"""Rules about balance losses and controllers: what is common to all; what one refuses stands beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetrain.config.rules import at_least
from moetrain.config.rules_router import built_router
from moetrain.config.schema import TrainConfig
from moetrain.errors import UserError

if TYPE_CHECKING:
    from moetrain.moe.routers import Router


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


def balance_fits_the_router(cfg: TrainConfig, world: int) -> None:
    if cfg.model.num_experts and (cfg.balance.losses or cfg.balance.controllers):
        refuse_balance(cfg, built_router(cfg), "")


def refuse_balance(cfg: TrainConfig, router: Router, where: str) -> None:
    """UserError where a loss or a controller is none that this router can have; ``where`` names its layer."""
    from moetrain.moe.balance import chosen_controllers, make_terms

    terms, named = make_terms(cfg.balance.losses), f"{where}router={router.options.name}"
    for i, term in enumerate(terms):
        if problem := term.spec.refuses(router):
            raise UserError(f"{named} {problem}: take balance.losses.{i}.name={term.name} out")
    for spec, _ in chosen_controllers(cfg.balance.controllers, terms):
        if problem := spec.refuses(router):
            raise UserError(f"{named} {problem}: take balance.controllers.{spec.name} out")


RULES = (balance_numbers, balance_is_accepted, balance_fits_the_router)
