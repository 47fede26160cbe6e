"""Which losses and controllers a router cannot have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moetrain.moe.balance.controllers.base import ControllerSpec
from moetrain.moe.balance.terms import LossTerm
from moetrain.moe.routers import Router


def losses_refusal(terms: Sequence[LossTerm], router: Router) -> str | None:
    """Why this router cannot have one of the losses; None where it can have all."""
    for i, term in enumerate(terms):
        if problem := term.spec.refuses(router) or term.spec.fits(term.options, router):
            return f"router={router.options.name} {problem}: take balance.losses.{i}.name={term.name} out"
    return None


def controllers_refusal(
    chosen: Sequence[tuple[ControllerSpec[Any], object]], routers: Sequence[Router]
) -> str | None:
    """Why none of these routers can have one of the controllers; None where each serves one of them."""
    for spec, _ in chosen:
        problems = [spec.refuses(router) for router in routers]
        if problems and all(problems):
            return f"router={routers[0].options.name} {problems[0]}: take balance.controllers.{spec.name} out"
    return None
