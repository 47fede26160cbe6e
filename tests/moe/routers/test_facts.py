"""What a router says of itself is what it does, and a setting that it never reads is refused.

Shapes: T tokens, D model, E experts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from moetrain.config.hydra.compose import compose_train
from moetrain.config.validate import validate
from moetrain.errors import UserError
from moetrain.models.count import experts_per_token
from moetrain.models.hf.own import exported_routers
from moetrain.moe import MoELayer, RouterContext, Routing, build_router
from moetrain.moe.balance import build_controllers, make_terms
from moetrain.moe.balance.settings import BalanceConfig, LossConfig
from moetrain.moe.options import DropOrder, RouterConfig
from moetrain.moe.routers import ROUTERS, Router, RouterSpec, full_options
from moetrain.moe.routers.topk import TopKOptions, TopKRouter
from moetrain.train.options import TrainConfig

NAMES = sorted(ROUTERS)
D, E, T = 5, 7, 53


def routed(router: Router) -> Routing:
    ctx = RouterContext.default(1, T)
    ctx = replace(ctx, token_ids_T=torch.arange(T))
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(3))
    routing: Routing = router(x_TD, ctx)
    return routing


def drawn(name: str) -> Router:
    torch.manual_seed(11)
    return build_router(name, d_model=D, num_experts=E)


@pytest.fixture(scope="module")
def base() -> TrainConfig:
    return compose_train([])


def refusal(base: TrainConfig, name: str, *losses: str, **controllers: dict[str, Any]) -> str:
    """The one line that refuses a router's balance, or an empty one."""
    balance = BalanceConfig([LossConfig(loss) for loss in losses], controllers)
    try:
        validate(replace(base, router=ROUTERS[name].options(), balance=balance))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", NAMES)
def test_a_moved_bias_is_read_or_refused(base: TrainConfig, name: str) -> None:
    router = drawn(name)
    before = routed(router)
    router.bias_E[2] = 10.0
    moved = not torch.equal(routed(router).demand_BE, before.demand_BE)
    said = refusal(base, name, bias={"rate": 0.01})
    assert moved is (said == "")
    if said:
        assert said.startswith(f"router={name} never reads the selection bias (adaptive, cosine,")
        assert said.endswith("take balance.controllers.bias out")
        assert "\n" not in said


@pytest.mark.parametrize("name", NAMES)
def test_the_sparsity_controller_needs_a_target(base: TrainConfig, name: str) -> None:
    said = refusal(base, name, "l1", sparsity={"rate": 1.2})
    if drawn(name).target_k is not None:
        assert said == ""
    elif ROUTERS[name].cls.has_scores:
        assert said.startswith(f"router={name} has no mean number of experts a token to aim at: take ")
    else:
        assert "returns no scores" in said


@pytest.mark.parametrize("name", ["relu", "blockffn"])
def test_the_sparsity_controller_aims_at_the_experts_asked_for(name: str) -> None:
    for asked, target in ((None, 2), (1, 1), (3, 3)):
        router = build_router(name, d_model=4, num_experts=8, top_k=asked)
        assert router.target_k == target
        (controller,) = build_controllers({"sparsity": {}}, make_terms([LossConfig("l1")]), {1: router})
        assert controller.target == 1 - target / 8
    with pytest.raises(ValueError, match=r"router\.top_k=9 must lie between 1 and num_experts=8"):
        build_router(name, d_model=4, num_experts=8, top_k=9)


def test_the_sparsity_controller_needs_its_loss(base: TrainConfig) -> None:
    said = refusal(base, "relu", "switch", "z", sparsity={"rate": 1.2})
    assert "controllers.sparsity.rate=1.2 is not used by balance.losses=['switch', 'z']" in said


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("loss", ["switch", "z", "locality", "penalty"])
def test_a_loss_is_of_what_the_routings_carry(base: TrainConfig, name: str, loss: str) -> None:
    routing = routed(drawn(name))
    needed = {"switch": routing.scores_TE, "penalty": routing.penalty}.get(loss, routing.logits_TE)
    said = refusal(base, name, loss)
    assert (needed is not None) is (said == ""), said
    assert not said or f"balance.losses.0.name={loss}" in said


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_no_token_takes_more_than_the_router_says(name: str, training: bool) -> None:
    layer = MoELayer(D, 3, E, router=name).train(training)
    routing = routed(layer.router)
    ours_N = routing.assignment.expert_ids_N() < E  # others are without a network
    assert int(
        torch.bincount(routing.assignment.token_ids_N[ours_N], minlength=T).max()
    ) <= experts_per_token(layer)


@pytest.mark.parametrize("name", ["hash", "random"])
def test_an_order_by_scores_needs_scores(name: str) -> None:
    with pytest.raises(ValueError, match="drop_order=batch_prioritized ranks tokens by scores"):
        build_router(name, d_model=D, num_experts=E, drop_order=DropOrder.batch_prioritized)


@pytest.mark.parametrize("name", exported_routers())
def test_words_of_evaluation_are_json(name: str) -> None:
    words = ROUTERS[name].options().evaluation_rule(E)
    assert words is not None
    assert json.loads(json.dumps(words)) == words


@dataclass(frozen=True)
class OwnOptions(TopKOptions):
    name: str = "own"


def test_words_of_evaluation_do_not_pass_to_a_subclass() -> None:
    """Its router may do otherwise."""
    assert RouterSpec("topk", TopKRouter, TopKOptions).exported
    assert not RouterSpec("own", TopKRouter, OwnOptions).exported


def test_shared_options_become_the_routers_own() -> None:
    assert full_options(RouterConfig("sigma", min_capacity=3)) == ROUTERS["sigma"].options(min_capacity=3)
    own = TopKOptions(top_k=3)
    assert full_options(own) is own
