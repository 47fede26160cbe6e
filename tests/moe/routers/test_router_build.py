"""Building routers by name, their errors, and the fp32 bias through every cast."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.moe import ROUTERS, MoELayer, Router, RouterContext, Routing, build_router
from moetrain.moe.assign import from_token_choice
from moetrain.moe.options import DropOrder, RouterConfig
from moetrain.moe.routers import register
from moetrain.moe.routers.topk import Score, TopKOptions


@pytest.mark.parametrize("num_experts", range(1, 18))
@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_every_router_works_without_options(name: str, num_experts: int) -> None:
    router = build_router(name, d_model=3, num_experts=num_experts)
    ctx = dataclasses.replace(RouterContext.default(2, 5), token_ids_T=torch.arange(10))
    routing = router(torch.randn(10, 3), ctx)
    routing.check()
    zero = 0 if router.zero_experts is None else router.zero_experts.total
    assert routing.num_experts == router.num_experts == num_experts + zero
    assert routing.assignment.num_ffn_experts == (num_experts if zero else None)
    assert routing.num_tokens_B.tolist() == [5, 5]
    if list(router.parameters()):
        routing.assignment.weights_N.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in router.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "tpok"}, "unknown router 'tpok'; did you mean 'topk'?"),
        ({"name": "zzz"}, "unknown router 'zzz'; known: adaptive"),
        ({"topk": 2}, "router 'topk' has no option 'topk'; did you mean 'top_k'?"),
        ({"zzz": 2}, "router 'topk' has no option 'zzz'; known: capacity_factor"),
        ({"score": "softmx"}, "score='softmx'; did you mean 'softmax'?"),
        ({"drop_order": "zzz"}, "drop_order='zzz'; known: batch_prioritized"),
        ({"top_k": 7}, "router.top_k=7 must lie between 1 and num_experts=6"),
        ({"top_k": 0}, "router.top_k=0 must lie between 1 and num_experts=6"),
        ({"num_groups": 4}, "router.num_groups=4 must divide num_experts=6"),
        ({"num_groups": 0}, "router.num_groups=0 must be 1 or more"),
        ({"num_groups": 3, "top_groups": 4}, "router.top_groups=4 must lie between 1 and num_groups=3"),
        ({"num_groups": 3, "top_groups": 1, "top_k": 3}, "router.top_k=3 exceeds the 2 experts of 1 groups"),
        ({"jitter": 1.0}, "router.jitter=1.0 must lie in"),
        ({"jitter": -0.1}, "router.jitter=-0.1 must lie in"),
        ({"num_experts": 0}, "num_experts=0 and d_model=5 must be at least 1"),
        ({"d_model": 0}, "num_experts=6 and d_model=0 must be at least 1"),
        ({"capacity_factor": 0.0}, "router.capacity_factor=0.0 must be above 0"),
        ({"eval_capacity_factor": -2.0}, "router.eval_capacity_factor=-2.0 must be above 0"),
    ],
)
def test_impossible_routers_are_refused_by_name(kwargs: dict[str, Any], message: str) -> None:
    arguments = {"name": "topk", "d_model": 5, "num_experts": 6, **kwargs}
    with pytest.raises(ValueError, match=re.escape(message)):
        build_router(arguments.pop("name"), **arguments)


def test_options_come_as_strings_enums_or_a_dataclass() -> None:
    options = TopKOptions(top_k=3, score=Score.sigmoid, drop_order=DropOrder.random)
    by_name = build_router("topk", d_model=3, num_experts=5, top_k=3, score="sigmoid", drop_order="random")
    by_value = build_router("topk", d_model=3, num_experts=5, options=options)
    assert by_name.options == by_value.options == options
    assert build_router("topk", d_model=3, num_experts=5, options=options, top_k=2).options.top_k == 2
    assert options.top_k == 3
    assert MoELayer(3, 2, 5, router_options=options).router.options == options
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.top_k = 4  # type: ignore[misc]


@pytest.fixture
def restore_registry() -> Iterator[None]:
    before = dict(ROUTERS)
    yield
    ROUTERS.clear()
    ROUTERS.update(before)


@pytest.mark.usefixtures("restore_registry")
def test_a_users_own_router_gets_capacity_and_a_layer() -> None:
    @dataclasses.dataclass(frozen=True)
    class FirstOptions(RouterConfig):
        name: str = "first"

    @register("first", FirstOptions)
    class First(Router):
        """Everything to expert 0."""

        def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
            ids_TK = torch.zeros(x_TD.shape[0], 1, dtype=torch.int64)
            return from_token_choice(ids_TK, x_TD.new_ones(x_TD.shape[0], 1), ctx, self.num_experts)

    x_BSD = torch.randn(2, 9, 3)
    y, routing = MoELayer(
        3, 5, 4, router="first", router_options={"capacity_factor": 1.0, "min_capacity": 0}
    )(x_BSD)
    assert routing.assignment.counts_E.tolist() == [6, 0, 0, 0]  # ceil(9 / 4) a sequence
    assert (y.abs().sum(-1) > 0).sum(1).tolist() == [3, 3]
    with pytest.raises(ValueError, match="router 'first' is registered already"):
        register("first", FirstOptions)(Router)


CASTS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "to": lambda m: m.to(torch.bfloat16),
    "there and back": lambda m: m.to(torch.bfloat16).to(torch.float32),
    "inside": lambda m: torch.nn.Sequential(torch.nn.ModuleList([m])).to(torch.bfloat16)[0][0],
    "device and dtype": lambda m: m.to("cpu", torch.float16),
    "deepcopy": lambda m: copy.deepcopy(m).bfloat16(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_the_bias_stays_fp32_through_casts(cast: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    values = torch.tensor([1 / 3, -1e-3, 1 + 2**-20, 0.0])  # none but 0 survives bf16
    layer = MoELayer(3, 5, 4)
    layer.router.bias_E.copy_(values)
    bias_E = cast(layer).router.bias_E
    assert bias_E.dtype == torch.float32
    assert torch.equal(bias_E, values)


def test_the_bias_survives_a_state_dict_round_trip() -> None:
    layer, other = MoELayer(3, 5, 4).bfloat16(), MoELayer(3, 5, 4).bfloat16()
    layer.router.bias_E += torch.tensor([1 / 3, -1e-3, 1 + 2**-20, 0.0])
    state = layer.state_dict()
    assert state["router.bias_E"].dtype == torch.float32
    other.load_state_dict(state)
    assert torch.equal(other.router.bias_E, layer.router.bias_E)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_bias_stays_fp32_on_the_meta_device(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        layer = MoELayer(3, 5, 4)
    layer = layer.to(dtype)
    assert layer.router.bias_E.is_meta
    assert layer.router.bias_E.dtype == torch.float32
    real = layer.to_empty(device="cpu")
    assert real.router.bias_E.dtype == torch.float32
    assert real.router.weight_ED.dtype == dtype
