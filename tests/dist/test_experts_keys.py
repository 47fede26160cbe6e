"""Vectors of experts that ranks hold, put together on all of them; and Avg-K, which routes so, on layouts.

Shapes: E experts, e of them here, D model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.cli import main
from moetrain.moe.dispatch.all_to_all import AllToAllDispatcher
from moetrain.moe.dispatch.collectives import Exchange
from moetrain.moe.dispatch.hierarchical import HierarchicalDispatcher
from moetrain.moe.dispatch.placement import Placement
from moetrain.parallel.ranks import run_ranks

P, E, D = 4, 12, 5
ELSEWHERE = Placement(P, (7, 0, 4, 11, 2, 9, 1, 3, 10, 8, 5, 6))
DEVICE = torch.device("cpu")


def vectors() -> Tensor:
    return torch.arange(E * D, dtype=torch.float64).view(E, D)


def together(rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """What a rank sees of all vectors, and the gradient of its own, of rank + 1 times what it sees."""
    everyone = Exchange(dist.group.WORLD)
    nodes = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    node = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    levels = everyone.over(nodes[rank % 2]), everyone.over(node[rank // 2])
    found = []
    for placement in (Placement.contiguous(E, P), ELSEWHERE):
        for dispatcher in (
            AllToAllDispatcher(everyone, placement, DEVICE),
            HierarchicalDispatcher(*levels, dist.group.WORLD, placement, DEVICE),
        ):
            mine_eD = vectors()[list(placement.of_rank(rank))].requires_grad_()
            whole_ED = dispatcher.whole(mine_eD)
            (gradient_eD,) = torch.autograd.grad((rank + 1) * whole_ED.square().sum() / 2, mine_eD)
            found.append((whole_ED.detach(), gradient_eD))
    return found


@pytest.mark.real
def test_vectors_of_experts_are_alike_on_all_ranks() -> None:
    for rank, found in enumerate(run_ranks(together, P, timeout=60)):
        placements = [p for p in (Placement.contiguous(E, P), ELSEWHERE) for _ in range(2)]
        for placement, (whole_ED, gradient_eD) in zip(placements, found, strict=True):
            assert torch.equal(whole_ED, vectors())
            assert torch.equal(gradient_eD, (1 + 2 + 3 + 4) * vectors()[list(placement.of_rank(rank))])


HSDP = ["parallel.ep=2", "parallel.dp_replicate=2"]
NODES = ["parallel.ep=4", "parallel.dispatcher=hierarchical"]


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(2, ["parallel.ep=2"], id="ep 2", marks=pytest.mark.slow),
        pytest.param(4, HSDP, id="hsdp 2 x ep 2", marks=pytest.mark.real),
        pytest.param(4, NODES, id="ep 4, hierarchical", marks=pytest.mark.slow),
        pytest.param(4, ["parallel.ep=2", "train.recompute=true"], id="recomputed", marks=pytest.mark.slow),
    ],
)
def test_avg_k_is_the_same_where_ranks_share_its_experts(
    world: int,
    layout: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With weights of scores and a balance loss, so that every rank's tokens move every expert's keys."""
    monkeypatch.chdir(tmp_path)
    model = ["model=avg_k", "model.avg_k.weight=score", "balance=switch_only"]
    code = main(["verify", *model, f"verify.world={world}", *layout])
    said = " ".join(capfd.readouterr().out.split())
    assert code == 0, said
    assert "equal to one process; certificate" in said
