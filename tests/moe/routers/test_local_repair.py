"""A local repair as an option of routers: the devices it names, and what it adds.

Shapes: T tokens, D model, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from repair_routers import LIMITS, normal, pairs_of, skewed, top_two
from torch import Tensor

from moetrain.moe import RouterContext, Routing, build_router
from moetrain.moe.assign import apply_capacity
from moetrain.moe.options import DropOrder, Repair
from moetrain.moe.repair import repair_overflow
from moetrain.moe.routers import Router


def test_a_local_repair_needs_devices_that_divide_the_experts() -> None:
    limits = {"d_model": 3, "num_experts": 6, "capacity_factor": 1.0}
    for rule in ("local", "local_fill_in"):
        for given in ({}, {"local_devices": 2}, {"local_sequences": 1}):
            with pytest.raises(
                ValueError, match=rf"^router\.repair={rule} is of the experts of a token's own"
            ):
                build_router("topk", repair=rule, **limits, **given)
        with pytest.raises(ValueError, match="local_devices=4 does not divide the 6 experts: take 3"):
            build_router("topk", repair=rule, **limits, local_devices=4, local_sequences=1)
    for key, value in (("local_devices", 2), ("local_sequences", 1)):
        with pytest.raises(ValueError, match=rf"^router\.{key}={value} is of .*, not of fill_in"):
            build_router("topk", repair="fill_in", **limits, **{key: value})
    with pytest.raises(ValueError, match="local_devices=1 must be 2 or more"):
        build_router("topk", repair="local", **limits, local_devices=1, local_sequences=1)
    wanted = top_two(skewed(0, 7, 5), RouterContext.default(1, 7))
    with pytest.raises(ValueError, match="needs to know each token's local experts"):
        repair_overflow(wanted, wanted, RouterContext.default(1, 7), Repair.local, *LIMITS)


@pytest.mark.parametrize("rule", ["local", "local_fill_in"])
@pytest.mark.parametrize("name", ["topk", "moepp"])
def test_what_a_local_repair_adds_lies_on_the_tokens_own_device(name: str, rule: str) -> None:
    """Sequences 5 to 10 go to devices in twos, device = id // 2 mod 3; experts of no network lie on all."""
    limits = {"capacity_factor": 0.6, "min_capacity": 0, "drop_order": "probability"}
    options = {"repair": rule, "local_devices": 3, "local_sequences": 2} | limits
    torch.manual_seed(0)
    router = build_router(name, d_model=5, num_experts=6, **options).double()
    ctx = replace(RouterContext.default(6, 7), sample_ids_B=torch.arange(5, 11))
    x_TD = 3 * normal(2, 42, 5)
    wanted = router.route(x_TD, ctx)
    kept = pairs_of(apply_capacity(wanted, ctx, 0.6, 0, DropOrder.probability, "sequence"))
    found = router(x_TD, ctx)
    added = pairs_of(found) - kept
    filled = set() if rule == "local" else pairs_of(build_filling(router, x_TD, ctx)) - kept
    assert len(added - filled) > 5
    for token, expert in added - filled:
        assert expert >= 6 or expert // 2 == (5 + token // 7) // 2 % 3
    assert {token for token, _ in kept | added} == set(range(42))
    if rule == "local":  # on another device's block a token has its share only where the router chose it
        other = build_router(name, d_model=5, num_experts=6, **options | {"local_sequences": 1}).double()
        other.load_state_dict(router.state_dict())
        assert pairs_of(other(x_TD, ctx)) != pairs_of(found)


def build_filling(router: Router, x_TD: Tensor, ctx: RouterContext) -> Routing:
    """What ``fill_in`` alone makes of the same weights and limits."""
    plain = replace(router.options, repair=Repair.fill_in, local_devices=None, local_sequences=None)
    experts = router.num_experts - (0 if router.zero_experts is None else router.zero_experts.total)
    other = build_router(plain.name, d_model=router.d_model, num_experts=experts, options=plain).double()
    other.load_state_dict(router.state_dict())
    return other(x_TD, ctx)
