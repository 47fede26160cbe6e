"""Controllers: selection bias, running load, a coefficient that follows its loss; updated after each step.

Shapes: L layers, T tokens, E experts, D model.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from moetrain.moe import Router, RouterContext, build_router
from moetrain.moe.balance import BiasController, LossFollower, RunningLoad, SparsityController


def routers(*experts: int, **options: object) -> list[Router]:
    torch.manual_seed(0)
    return [build_router("topk", d_model=8, num_experts=number, **options) for number in experts]


@pytest.mark.parametrize("rate", [2.0**-10, 1e-3, 0.7])
def test_one_update_moves_every_bias_by_the_rate_or_not_at_all(rate: float) -> None:
    pair = routers(4, 3)
    before = [torch.tensor([0.0, 1.5, -3.0, 0.25]), torch.zeros(3)]
    for router, bias_E in zip(pair, before, strict=True):
        router.bias_E.copy_(bias_E)
    # means 5 and 3: above the mean goes down, below goes up, at the mean stays; layer 2 has no router
    demand = {1: torch.tensor([5, 9, 1, 5]), 2: torch.tensor([1, 7]), 6: torch.tensor([6, 3, 0])}
    BiasController(dict(zip((1, 6), pair, strict=True)), rate).update(demand)
    moves = [torch.tensor([0.0, -1, 1, 0]), torch.tensor([-1.0, 0, 1])]
    for router, bias_E, move_E in zip(pair, before, moves, strict=True):
        assert torch.equal(router.bias_E, bias_E + move_E * rate)


def test_neighbouring_loads_are_told_apart_at_any_size() -> None:
    """Above 2^24 assignments fp32 no longer counts by ones."""
    (router,) = routers(3)
    BiasController({0: router}, 0.5).update({0: torch.tensor([2**24, 2**24 + 1, 2**24 + 2])})
    assert router.bias_E.tolist() == [0.5, 0.0, -0.5]


def test_small_steps_survive_a_bf16_model() -> None:
    """In bf16, 1 + 0.001 is 1: the bias would never move again."""
    (router,) = routers(4)
    controller = BiasController({0: router}, 1e-3)
    router.bias_E.fill_(1.0)
    router.to(torch.bfloat16)
    for _ in range(10):
        controller.update({0: torch.tensor([9, 1, 1, 1])})
    torch.testing.assert_close(router.bias_E, torch.tensor([0.99, 1.01, 1.01, 1.01]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_bias_balances_a_skewed_router_in_200_steps(score: str) -> None:
    (router,) = routers(8, score=score)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight_ED[:, 0] = torch.linspace(-1, 1, 8)

    def demand_E() -> Tensor:
        x_TD = torch.randn(512, 8, generator=generator)
        x_TD[:, 0] = 1
        return router(x_TD, RouterContext.default(8, 64)).demand_E

    def variation() -> float:
        loads = torch.stack([demand_E() for _ in range(8)]).sum(0).double()
        return float(loads.std() / loads.mean())

    before, weight_ED = variation(), router.weight_ED.detach().clone()
    controller = BiasController({0: router}, 5e-3)
    for _ in range(200):
        controller.update({0: demand_E()})
    assert before > 0.7
    assert variation() < 0.15
    assert torch.equal(router.weight_ED, weight_ED)
    assert controller.tensors() == {}  # the bias is a buffer of the router, saved with the model


def test_the_running_load_is_an_exponential_mean_of_shares() -> None:
    running = RunningLoad({1: 4, 3: 2}, decay=0.75)
    assert running.shares[1].tolist() == [0.25] * 4
    state = running.tensors()
    assert list(state) == ["running_load.1", "running_load.3"]
    want = {1: torch.full((4,), 0.25).double(), 3: torch.full((2,), 0.5).double()}
    for four, two in (([8, 0, 0, 0], [1, 1]), ([1, 2, 3, 4], [0, 5])):
        demand = {1: torch.tensor(four), 3: torch.tensor(two)}
        running.update(demand)
        want = {n: 0.75 * want[n] + 0.25 * load_E / load_E.sum() for n, load_E in demand.items()}
    for layer, want_E in want.items():
        torch.testing.assert_close(running.shares[layer].double(), want_E, rtol=0, atol=1e-6)
        # what a checkpoint holds is the state itself, fp32
        assert state[f"running_load.{layer}"] is running.shares[layer]
        assert running.shares[layer].dtype == torch.float32


def test_a_layer_that_routed_nothing_keeps_its_running_load() -> None:
    running = RunningLoad({0: 4, 1: 4, 2: 3})
    demand = {0: torch.tensor([3, 1, 0, 0]), 1: torch.zeros(4, dtype=torch.int64), 5: torch.ones(2)}
    running.update(demand)  # 2: not routed; 5: not followed
    for share_E in running.shares.values():
        torch.testing.assert_close(share_E.sum(), torch.ones(()))
    assert torch.equal(running.shares[1], torch.full((4,), 0.25))
    torch.testing.assert_close(running.shares[2], torch.full((3,), 1 / 3))


def follow(controller: LossFollower, *windows: float) -> list[float]:
    """The factor after each window of steps over which the loss has these means, in two layers together."""
    factors = []
    for mean in windows:
        for step in range(controller.every):
            wave = 0.5 * mean * (-1) ** step if controller.every % 2 == 0 else 0.0  # only the mean counts
            losses = {"x": torch.tensor([0.75 * mean, 0.25 * mean + wave]), "other": torch.tensor([9.0, 9.0])}
            controller.update({}, 5.0, losses)
        factors.append(controller.factors()["x"][3])
    return factors


def test_a_coefficient_follows_its_loss() -> None:
    """Nothing while it holds; then up with it by at least min_factor, down freely, never above max_factor."""
    controller = LossFollower("x", [3], max_factor=3.0, min_factor=1.5, hold=8, every=4)
    assert follow(controller, 2.0, 2.0) == [1.0, 1.0]
    follow(controller, 4.0)  # from here on the factor after a window is a part of the way to its goal
    goals = [float(controller.goal)]
    for mean in (4.0, 4.4, 1.1, 8.8, 17.6):
        follow(controller, mean)
        goals.append(float(controller.goal))
    assert goals == pytest.approx([2.0, 2.0, 3.0, 0.75, 3.0, 3.0])


def test_a_coefficient_moves_in_equal_parts() -> None:
    """By hand: at step b a goal is set, and at step b + n the factor is n / every of the way there."""
    controller = LossFollower("x", [3], max_factor=9.0, min_factor=1.0, hold=5, every=5)
    means = [1.0, 3.0, 6.0, 3.0]
    factors = [1.0]  # of each step, from the first on
    for mean in means:
        for _ in range(5):
            controller.update({}, 5.0, {"x": torch.tensor([mean])})
            factors.append(controller.factors()["x"][3])
    ends = [1.0, 1.0, 1.0, 3.0, 6.0, 3.0]  # at steps 0, 5, 10, 15, 20 and 25
    parts = [before + (after - before) * n / 5 for before, after in pairwise(ends) for n in range(1, 6)]
    assert factors == pytest.approx(parts[: len(factors)])


def test_a_coefficient_holds_for_the_first_steps() -> None:
    for hold, goals in ((8, [1.0, 2.0, 4.0]), (9, [1.0, 1.0, 2.0])):
        controller, found = LossFollower("x", [3], 9.0, hold=hold, every=4), []
        for mean in (1.0, 2.0, 4.0):
            follow(controller, mean)
            found.append(float(controller.goal))
        assert found == pytest.approx(goals)


def test_a_loss_of_zero_leaves_its_coefficient_alone() -> None:
    controller = LossFollower("x", [3], max_factor=9.0, hold=0, every=3)
    assert follow(controller, 0.0, 2.0, 0.0, 5.0) == [1.0, 1.0, 1.0, 1.0]
    follow(controller, 10.0)
    assert float(controller.goal) == pytest.approx(2.0)


@pytest.mark.parametrize("step", [1, 5, 8, 11])
def test_a_restored_follower_goes_on_bit_for_bit(step: int) -> None:
    values = torch.rand(23, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    whole, before, after = (LossFollower("x", [3], 2.0, hold=4, every=4) for _ in range(3))
    for x in values:
        whole.update({}, 5.0, {"x": x})
    for x in values[:step]:
        before.update({}, 5.0, {"x": x})
    for name, tensor in after.tensors().items():  # as a checkpoint loads: in place
        tensor.copy_(before.tensors()[name])
    for x in values[step:]:
        after.update({}, 5.0, {"x": x})
    assert {t.dtype for t in whole.tensors().values()} == {torch.int64, torch.float64}
    assert {name: t.item() for name, t in after.tensors().items()} == {
        name: t.item() for name, t in whole.tensors().items()
    }
    assert whole.factors()["x"] != {3: 1.0}


def test_sparsity_passes_three_stages_and_never_goes_back() -> None:
    controller = SparsityController({0: 8, 1: 8}, {0: 2, 1: 2})  # target: 0.75 of the pairs inactive
    said, stages = [], []
    for per_token in (4.0, 3.9, 3.7, 2.5, 2.0, 2.6):  # inactive: 0.5, 0.5125, 0.5375, 0.69, 0.75, 0.675
        demand_E = torch.full((8,), round(per_token * 1000 / 8))
        controller.update({0: demand_E, 1: demand_E}, 1000.0)
        stages.append(controller.metrics()["sparsity_stage"])
        said.append(controller.messages())
    assert stages == [1, 1, 2, 2, 3, 3]
    assert [len(lines) for lines in said] == [1, 0, 1, 0, 1, 0]
    assert "stage 3 of 3, sparse: 0.750" in said[4][0]
    assert controller.metrics()["sparsity"] == pytest.approx(0.675)
    assert set(controller.tensors()) == {"sparsity_exponent", "sparsity_stage", "sparsity_first"}


def test_layers_of_a_sparsity_controller_differ() -> None:
    """Pairs and targets are summed over layers; each layer's k divides its own coefficient."""
    controller = SparsityController({1: 3, 4: 7}, {1: 1, 4: 2}, start=0.5)
    assert controller.target == 1 - 3 / 10
    controller.update({1: torch.tensor([5, 0, 0]), 4: torch.tensor([5, 5, 5, 0, 0, 0, 5])}, 5.0)
    assert controller.metrics()["sparsity"] == 0.5
    assert controller.factors() == {"l1": {1: 0.5 * 1.2, 4: 0.5 * 1.2 / 2}}


@pytest.mark.usefixtures("training")
def test_a_run_tells_the_stages(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["router=relu", "router.top_k=2", "checkpoint.every=1"]
    assert tiny.train(corpus, tmp_path, *options, "train.steps=1") == 0
    assert "sparsity stage 1 of 3, dense" in capsys.readouterr().out
    assert tiny.train(corpus, tmp_path, *options, "train.steps=2") == 0
    assert "sparsity stage 1" not in capsys.readouterr().out  # said once, also over a resume
    rows = tiny.steps(tmp_path)
    assert [row["balance/sparsity_stage"] for row in rows] == [1, 1]
    assert all(0.3 < row["balance/sparsity"] < 0.7 for row in rows)
    assert rows[1]["balance/sparsity_coef"] == pytest.approx(1.2 * rows[0]["balance/sparsity_coef"])
