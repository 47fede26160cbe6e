"""Rules about balance losses and controllers: what is common to all; what one refuses stands beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moetrain.config.rules.router import built_router
from moetrain.errors import UserError
from moetrain.train.options import TrainConfig

if TYPE_CHECKING:
    from moetrain.moe.routers import Router


def balance_is_accepted(cfg: TrainConfig, world: int) -> None:
    """Names, scopes and options, as each loss and controller has them."""
    from moetrain.moe.balance import chosen_controllers, make_terms

    try:
        chosen_controllers(cfg.balance.controllers, make_terms(cfg.balance.losses))
    except ValueError as error:
        raise UserError(f"balance.{error}") from None


def balance_fits_the_router(cfg: TrainConfig, world: int) -> None:
    if cfg.model.num_experts and (cfg.balance.losses or cfg.balance.controllers):
        router = built_router(cfg)
        refuse_losses(cfg, router, "")
        refuse_controllers(cfg, [router], "")


def refuse_losses(cfg: TrainConfig, router: Router, where: str) -> None:
    """UserError where a loss is none that this router can have; ``where`` names its layer."""
    from moetrain.moe.balance import make_terms

    for i, term in enumerate(make_terms(cfg.balance.losses)):
        if problem := term.spec.refuses(router):
            raise UserError(
                f"{where}router={router.options.name} {problem}: take balance.losses.{i}.name={term.name} out"
            )


def refuse_controllers(cfg: TrainConfig, routers: Sequence[Router], where: str) -> None:
    """UserError where a controller is none that any of these routers can have."""
    from moetrain.moe.balance import chosen_controllers, make_terms

    for spec, _ in chosen_controllers(cfg.balance.controllers, make_terms(cfg.balance.losses)):
        problems = [spec.refuses(router) for router in routers]
        if problems and all(problems):
            raise UserError(
                f"{where}router={routers[0].options.name} {problems[0]}: take "
                f"balance.controllers.{spec.name} out"
            )


RULES = (balance_is_accepted, balance_fits_the_router)
