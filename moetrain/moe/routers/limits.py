"""Which limits on experts' loads go together: capacity, its repair, rounding, and a hard bound."""

from __future__ import annotations

from moetrain.moe.assign import ALL
from moetrain.moe.options import DropOrder, Repair, Rounding, RouterConfig


def check_capacity(options: RouterConfig) -> None:
    """Raise ValueError for limits on experts' loads that do not go together."""
    if options.group == ALL and (options.capacity_factor or options.eval_capacity_factor) is not None:
        raise ValueError(
            "router.group=all has no capacity: set router.capacity_factor=null, or a smaller group"
        )
    if options.rounding is not Rounding.none:
        _check_rounding(options)
    if options.max_overload is not None:
        _check_load_bound(options)
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


def _check_load_bound(options: RouterConfig) -> None:
    bound = f"router.max_overload={options.max_overload}"
    if options.group == ALL:
        raise ValueError(
            f"{bound} is of tokens in their order on one rank, not of router.group=all: set a smaller group"
        )
    if options.capacity_factor is not None or options.rounding is not Rounding.none:
        raise ValueError(
            f"{bound} decides how many tokens an expert takes: set router.capacity_factor=null and "
            "router.rounding=none, or router.max_overload=null"
        )


def check_scores(name: str, options: RouterConfig) -> None:
    """Raise ValueError for what ranks by scores, of a router that has none."""
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
    if options.max_overload is not None:
        raise ValueError(
            f"router.max_overload={options.max_overload} ranks experts by scores, and router={name} returns "
            "none: set router.max_overload=null"
        )
    if options.drop_order is DropOrder.batch_prioritized:
        raise ValueError(
            f"router.drop_order=batch_prioritized ranks tokens by scores, and router={name} returns none: "
            "take another order"
        )
