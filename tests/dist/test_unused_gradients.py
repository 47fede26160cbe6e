"""A parameter that only some ranks use has the sum of their gradients.

Shapes: T tokens, D model, F hidden.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from moetrain.compat import reduce_unused_gradients
from moetrain.parallel.ranks import run_ranks

D, HIDDEN, STEPS = 5, 7, 3


class Fork(nn.Module):
    """Two networks, of which a rank's tokens take one."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList([nn.Linear(D, HIDDEN), nn.Linear(D, HIDDEN)])

    def forward(self, x_TD: Tensor, way: int) -> Tensor:
        y_TF: Tensor = self.ways[way](x_TD)
        return y_TF


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fork = Fork()
        self.common, self.rare = nn.Parameter(torch.ones(HIDDEN)), nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x_TD: Tensor, way: int) -> Tensor:
        y_TF: Tensor = self.fork(x_TD, way) * self.common
        return y_TF * self.rare if way else y_TF


def way_of(step: int, rank: int) -> int:
    """All ranks go alike in the first and the last step, which way 1 is not part of."""
    return int(step == 1 and rank > 0)


def whole_numbers(generator: torch.Generator, *shape: int) -> Tensor:
    """-1, 0 and 1: all that is computed from them is exact in bf16 too."""
    return torch.randint(-1, 2, shape, generator=generator).float()


def loss(model: nn.Module, step: int, rank: int) -> Tensor:
    x_TD = whole_numbers(torch.Generator().manual_seed(10 * step + rank), 3, D)
    squares: Tensor = model(x_TD, way_of(step, rank)).square()
    return squares.float().sum()


def new_model() -> Model:
    model, generator = Model(), torch.Generator().manual_seed(3)
    for parameter in model.fork.parameters():
        parameter.data.copy_(whole_numbers(generator, *parameter.shape))
    return model


def gradients(rank: int, world: int, accumulate: bool, bf16: bool) -> list[dict[str, Tensor]]:
    """Of every parameter after each step, whole; ``accumulate``: they are summed over all steps before."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    model = new_model()
    for module in (model.fork, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (world,)), mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    reduce_unused_gradients(model)
    found = []
    for step in range(STEPS):
        if accumulate:
            model.set_requires_gradient_sync(step == STEPS - 1)
        else:
            model.zero_grad()
        loss(model, step, rank).backward()
        if step == STEPS - 1 or not accumulate:
            found.append({name: p.grad.full_tensor() for name, p in model.named_parameters()})
    return found


def expected(world: int, steps: list[int]) -> dict[str, Tensor]:
    """The same by one process."""
    model = new_model()
    for step in steps:
        for rank in range(world):
            loss(model, step, rank).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["each step", "accumulated"])
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.real)])
def test_gradients_are_sums_over_the_ranks_that_use_them(world, accumulate, bf16):
    sums = [[*range(STEPS)]] if accumulate else [[step] for step in range(STEPS)]
    for found in run_ranks(gradients, world, accumulate, bf16):
        for of_one, steps in zip(found, sums, strict=True):
            for name, gradient in expected(world, steps).items():
                assert torch.equal(of_one[name], gradient), name
