"""8-bit moments of a parameter's parts: of ranks that hold nothing of it, and cut by columns."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moetrain.checkpoint.state_dict import optimizer_tensors, take_optimizer_tensors
from moetrain.parallel.ranks import run_ranks
from moetrain.train.optim.build import build_optimizer
from moetrain.train.optim.options import AdamW8bitConfig

pytestmark = pytest.mark.real
CFG = AdamW8bitConfig(lr=0.01, min_8bit_size=1)
CUTS = {"one row": ((1, 300), 0), "rows": ((5, 100), 0), "columns": ((3, 400), 1)}


class Net(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps_of(net: Net, optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> None:
    for grad in grads:
        net.weight.grad = grad.clone()
        optimizer.step()


def parts(rank: int, world: int) -> dict[str, tuple[int, bool, float]]:
    """Of each cut: elements here, whether a loaded copy went on alike, how far from this part's update."""
    mesh, found = init_device_mesh("cpu", (world,)), {}
    for name, (shape, dim) in CUTS.items():

        def placed(whole: Tensor, dim: int = dim) -> DTensor:
            return distribute_tensor(whole, mesh, [Shard(dim)])

        net, grads = Net(placed(drawn(shape, 0))), [placed(drawn(shape, seed)) for seed in (1, 2, 3)]
        optimizer = build_optimizer(net, CFG)
        steps_of(net, optimizer, grads[:2])
        saved = optimizer_tensors(net, optimizer)
        assert saved["optim.weight.exp_avg"].placements == net.weight.placements
        assert saved["optim.weight.step"] == 2  # also where there is nothing to update
        copy = Net(net.weight.detach().clone())
        copies = build_optimizer(copy, CFG)
        filled = optimizer_tensors(copy, copies)
        for key, tensor in filled.items():
            tensor.copy_(saved[key])
        take_optimizer_tensors(copy, copies, filled)
        steps_of(net, optimizer, grads[2:])
        steps_of(copy, copies, grads[2:])
        alike = torch.equal(net.weight.to_local(), copy.weight.to_local())
        own = [t.to_local() for t in (placed(drawn(shape, 0)), *grads)]
        alone = Net(own[0].clone())
        steps_of(alone, build_optimizer(alone, CFG), own[1:])
        apart = (alone.weight.detach() - net.weight.to_local()).abs()
        found[name] = (own[0].numel(), alike, float(apart.max()) if apart.numel() else 0.0)
    dist.barrier()
    return found


def test_a_rank_may_hold_a_part_or_nothing() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: bitsandbytes)")
    first, second = run_ranks(parts, 2)
    assert {name: (first[name][0], second[name][0]) for name in CUTS} == {
        "one row": (300, 0),
        "rows": (300, 200),
        "columns": (600, 600),
    }
    assert all(alike and apart == 0 for found in (first, second) for _, alike, apart in found.values())
