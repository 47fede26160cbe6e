"""Losses of a mean over tokens: their values, and that no split of the batch changes what is invariant."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from balance_cases import step_totals
from invariance import B, E, Outcome, assert_same, gradients, router_difference

from moetrain.moe import MoELayer, RouterContext, Routing, build_router
from moetrain.moe.assign import from_mask
from moetrain.moe.balance import LossTerm, SparsityController, StepTotals, total_loss
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.expert_choice import ExpertChoiceOptions
from moetrain.moe.routers.gshard import GShardOptions
from moetrain.moe.routers.noisy_topk import NoisyTopKOptions
from moetrain.moe.routers.relu import ReLUOptions
from moetrain.moe.routers.sparsemixer import SparseMixer2Options

NAMES = ["concentration", "importance", "load", "mi", pytest.param("entropy", marks=pytest.mark.real)]


def routing_of(p_TE: torch.Tensor, batch: int = 1) -> Routing:
    """Every expert for every token, with p as weights and scores."""
    ctx = RouterContext.default(batch, len(p_TE) // batch)
    return from_mask(torch.ones_like(p_TE, dtype=torch.bool), p_TE, ctx, p_TE, p_TE.log())


def value(name: str, routing: Routing, scope: str = "micro") -> float:
    tokens = float(routing.num_tokens)
    _, raw = total_loss({0: routing}, [LossTerm(name, 1.0, scope)], StepTotals(tokens))
    return float(raw[f"{name}_{scope}"][0])


def test_values_where_they_are_known():
    even = torch.full((12, 4), 0.25, dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(torch.arange(12) % 4, 4).double()
    collapsed = torch.nn.functional.one_hot(torch.zeros(12, dtype=torch.int64), 4).double()
    for p_TE, mi, entropy, importance in (
        (even, 0.0, -math.log(4), 0.0),
        (one_hot, -math.log(4), -math.log(4), 0.0),
        (collapsed, 0.0, 0.0, 4.0),
    ):
        routing = routing_of(p_TE)
        assert value("mi", routing) == pytest.approx(mi, abs=1e-9)
        assert value("entropy", routing) == pytest.approx(entropy, abs=1e-9)
        assert value("concentration", routing) == pytest.approx(-entropy, abs=1e-9)
        assert value("importance", routing) == pytest.approx(importance, abs=1e-6)
    assert value("importance", routing_of(torch.ones(3, 1).double())) == 0.0


def test_sequence_is_the_mean_over_sequences():
    p_TE = torch.softmax(torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).double(), -1)
    halves = [value("importance", routing_of(half)) for half in p_TE.split(5)]
    assert value("importance", routing_of(p_TE, batch=2), "sequence") == pytest.approx(sum(halves) / 2)
    assert value("importance", routing_of(p_TE, batch=2)) < sum(halves) / 2


def test_a_longer_sequence_weighs_more():
    """By its valid tokens: five of the first sequence, two of the second."""
    p_TE = torch.softmax(torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).double(), -1)
    valid_T = torch.arange(10) % 5 < torch.tensor([5] * 5 + [2] * 5)
    ctx = replace(RouterContext.default(2, 5), valid_T=valid_T)
    both = from_mask(torch.ones_like(p_TE, dtype=torch.bool), p_TE, ctx, p_TE, p_TE.log())
    means = [part.mean(0) for part in (p_TE[:5], p_TE[5:7])]
    for name, function in (
        ("importance", lambda m_E: m_E.var() / m_E.mean() ** 2),
        ("entropy", lambda m_E: (m_E * m_E.log()).sum()),
    ):
        first, second = (float(function(m_E)) for m_E in means)
        assert value(name, both, "sequence") == pytest.approx((5 * first + 2 * second) / 7)


def step(
    name: str, scope: str, micro: int, recompute: bool = False, router: RouterConfig | None = None
) -> Outcome:
    losses = [LossTerm(name, 0.5, scope)]
    return gradients(losses, micro, recompute, router=router or NoisyTopKOptions(top_k=2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scope", ["sequence", "global_batch"])
def test_no_gradient_depends_on_the_split_or_on_recompute(name, scope):
    whole = step(name, scope, B)
    assert router_difference(whole, step(name, "micro", 4)) > 1e-6
    for micro, recompute in ((B, True), (2, False), (1, True)):
        assert_same(whole, step(name, scope, micro, recompute))


@pytest.mark.parametrize("name", NAMES)
def test_micro_and_global_batch_are_one_for_one_micro_batch(name):
    """What the linearisation has to give: the value and the gradient of F itself."""
    whole, direct = step(name, "global_batch", B), step(name, "micro", B)
    renamed = {key.replace("_micro", "_global_batch"): v for key, v in direct.figures.items()}
    assert_same(whole, Outcome(direct.tensors, renamed))


@pytest.mark.parametrize(
    "router",
    [
        GShardOptions(), GShardOptions(second="sampling"), SparseMixer2Options(top_k=2), ReLUOptions(),
        ExpertChoiceOptions(),
    ],
    ids=["gshard", "gshard_sampling", "sparsemixer2", "relu", "expert_choice"],
)  # fmt: skip
def test_noise_and_choices_ignore_split_and_recompute(router):
    whole = step("switch", "global_batch", B, router=router)
    for micro, recompute in ((B, True), (2, False), (1, True)):
        assert_same(whole, step("switch", "global_batch", micro, recompute, router))


def test_l1_is_the_mean_sum_of_scores_at_balance():
    """With c_e = T k / E for all e: k times mean ||R||_1, and the controller's factor divides by k."""
    scores_TE = torch.rand(12, 4, generator=torch.Generator().manual_seed(1)).double() + 0.1
    mask_TE = (torch.arange(4) - torch.arange(12)[:, None]) % 4 < 2
    routing = from_mask(mask_TE, scores_TE, RouterContext.default(2, 6), scores_TE)
    assert routing.assignment.counts_E.tolist() == [6] * 4
    controller = SparsityController({0: 4}, {0: 2})
    totals = replace(step_totals(12.0, {0: routing.demand_E}), factors=controller.factors())
    loss, _ = total_loss({0: routing}, [LossTerm("l1", 1.0, "global_batch")], totals)
    assert float(loss) == pytest.approx(1e-8 * float(scores_TE.sum(-1).mean()))


def test_the_sparsity_controller_counts_steps():
    controller = SparsityController(dict.fromkeys(range(3), 8), dict.fromkeys(range(3), 2))
    dense, sparse = torch.full((3, 8), 50), torch.full((3, 8), 10)  # of 100 tokens: 4 and 0.8 experts each
    for demand_LE in (dense, dense, dense, sparse):
        controller.update(dict(enumerate(demand_LE)), 100.0)
    assert controller.coef == pytest.approx(1e-8 * 1.2**2)
    assert controller.factors() == {"l1": dict.fromkeys(range(3), controller.coef / 2)}
    saved = controller.tensors()["sparsity_exponent"]
    assert saved.dtype is torch.int64
    assert int(saved) == 2
    assert math.log(controller.coef / 1e-8) / math.log(1.2) == pytest.approx(2)


def test_relu_reaches_its_target_in_a_toy_run():
    """300 steps of a layer on sixteen planted clusters: the share of inactive pairs ends at 1 - k / E."""
    torch.manual_seed(0)
    num_experts, k, width, batch, seq = 8, 2, 32, 16, 32
    centers, targets = torch.randn(16, width), 0.3 * torch.randn(16, width)
    layer = MoELayer(width, 32, num_experts, router="relu", router_options={"top_k": k})
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    controller = SparsityController({0: num_experts}, {0: k})
    term = LossTerm("l1", 1.0, "global_batch")
    shares = []
    for _ in range(300):
        ids_BS = torch.randint(16, (batch, seq))
        y_BSD, routing = layer(centers[ids_BS] + 0.3 * torch.randn(batch, seq, width))
        totals = replace(step_totals(batch * seq, {0: routing.demand_E}), factors=controller.factors())
        extra, _ = total_loss({0: routing}, [term], totals)
        optimizer.zero_grad()
        ((y_BSD - targets[ids_BS]).square().mean() + extra).backward()
        optimizer.step()
        controller.update({0: routing.demand_E}, batch * seq)
        shares.append(1 - float(routing.assignment.counts_E.sum()) / (batch * seq * num_experts))
    assert shares[0] < 0.6
    assert abs(sum(shares[-30:]) / 30 - (1 - k / num_experts)) < 0.02


def test_a_coefficient_goes_to_its_final_value():
    term = LossTerm("switch", 1.0, "sequence", final_coef=0.2, final_step=4)
    assert [term.coef_at(s) for s in (0, 1, 4, 9)] == pytest.approx([1.0, 0.8, 0.2, 0.2])
    assert LossTerm("switch", 1.0, "sequence").coef_at(9) == 1.0
    routing = build_router("topk", d_model=E, num_experts=E)(torch.randn(6, E), RouterContext.default(1, 6))
    early, _ = total_loss({0: routing}, [term], StepTotals(6.0, step=0))
    late, _ = total_loss({0: routing}, [term], StepTotals(6.0, step=4))
    assert late.item() == pytest.approx(0.2 * early.item())
