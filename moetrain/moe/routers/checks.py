"""What a router refuses of the options that all routers share: ValueError, in one line."""

from __future__ import annotations

from moetrain.moe.assign import ALL
from moetrain.moe.options import DropOrder, Repair, Rounding, RouterConfig


def check_capacity(options: RouterConfig) -> None:
    """Capacity, rounding and repair against one another."""
    if options.group == ALL and (options.capacity_factor or options.eval_capacity_factor) is not None:
        raise ValueError(
            "router.group=all has no capacity: set router.capacity_factor=null, or a smaller group"
        )
    if options.rounding is not Rounding.none:
        _check_rounding(options)
    if options.repair is not Repair.none and not options.limits:
        raise ValueError(
            f"router.repair={options.repair.name} has nothing to repair without a capacity: "
            "set router.capacity_factor, or router.repair=none"
        )


def _check_rounding(options: RouterConfig) -> None:
    rounding = options.rounding.name
    if options.group == ALL:
        raise ValueError(
            f"router.rounding={rounding} is of the tokens of one rank, not of router.group=all: "
            "set a smaller group, or router.rounding=none"
        )
    if options.capacity_factor is not None:
        raise ValueError(
            f"router.rounding={rounding} and router.capacity_factor={options.capacity_factor} both decide "
            "how many tokens an expert takes: set router.capacity_factor=null, or router.rounding=none"
        )


def check_permutation(name: str, options: RouterConfig) -> None:
    """Of a router whose experts cannot change places."""
    if options.permutation_steps is not None:
        raise ValueError(
            f"router.permutation_steps={options.permutation_steps} puts experts in another order, which "
            f"router={name} cannot take: its experts differ in kind, or its assignments in scale; "
            "set router.permutation_steps=null"
        )


def check_scores(name: str, options: RouterConfig) -> None:
    """Of a router without scores: what ranks by them is refused."""
    if options.repair is not Repair.none:
        raise ValueError(
            f"router.repair={options.repair.name} ranks experts by scores, and router={name} returns none: "
            "set router.repair=none"
        )
    if options.rounding is not Rounding.none:
        raise ValueError(
            f"router.rounding={options.rounding.name} ranks tokens by scores, and router={name} returns "
            "none: set router.rounding=none"
        )
    if options.drop_order is DropOrder.batch_prioritized:
        raise ValueError(
            f"router.drop_order=batch_prioritized ranks tokens by scores, and router={name} returns none: "
            "take another order"
        )
