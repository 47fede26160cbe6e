"""Expert parallelism equals one process: loss, every gradient, the norm, and the weights after three steps."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import invariance
import pytest
import torch
from invariance import B, Outcome, assert_same, batch, gradients, terms, weights_after_three_steps
from moetrain.parallel.ranks import run_ranks

from moetrain.config.schema import ParallelConfig
from moetrain.data import Batch
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers import ROUTERS
from moetrain.moe.routers.topk import TopKOptions
from moetrain.parallel.mesh import build_meshes

E = 8  # a multiple of every ep here; all other sizes are primes or uneven
LAYOUTS = {
    "ep 2": (2, ParallelConfig(ep=2)),
    "ep 4": (4, ParallelConfig(ep=4)),
    "ep 2 x efsdp 2": (4, ParallelConfig(ep=2)),
    "hsdp 2 x ep 2": (4, ParallelConfig(dp_replicate=2, ep=2)),
}


def options(name: str) -> RouterConfig:
    if name == "everything on one expert":
        return TopKOptions(top_k=1)
    made = ROUTERS[name].options(name=name)
    if name == "topk":  # noise, and a capacity that drops
        return replace(made, top_k=2, capacity_factor=1.2, min_capacity=1, jitter=0.1)
    return replace(made, num_groups=4, top_groups=2) if name == "sigmoid" else made


# What has no gradient on one process either: the first layer's residual; the experts and router never reached.
TRIVIAL = {"moepp": "blocks.1.feed_forward.router.residual_EE", "everything on one expert": "feed_forward"}
ROUTER_NAMES = ("topk", "sigmoid", "expert_choice", "relu", "base", "moepp", "sparsemixer2", "everything on one expert")


def prepare(name: str) -> None:
    """This process's small model: E experts, and for the extreme case a router that sends all to one."""
    invariance.MODEL = replace(invariance.MODEL, num_experts=E)
    invariance.E = E


def cases(rank: int, world: int, layout: ParallelConfig | None) -> list[tuple[Outcome, Outcome]]:
    found = []
    for number, name in enumerate(ROUTER_NAMES):
        prepare(name)
        meshes = build_meshes(layout, world) if layout else None
        router = options(name)
        losses = terms("switch", "global_batch")
        if name == "everything on one expert":
            losses = []
            router = replace(router, num_groups=1)
        recompute = number % 2 == 1
        micro = B // 4 if world < 4 else 1
        one = gradients(losses, micro, recompute, rank, world, meshes, only_one_expert(name), router=router)
        found.append((one, weights_after_three_steps(micro, recompute, rank, world, meshes, router=router)))
    return found


def only_one_expert(name: str) -> Batch | None:
    """All tokens alike and at one position: every router of scores sends them the same way."""
    if name != "everything on one expert":
        return None
    whole = batch()
    return replace(
        whole,
        input_ids_BS=torch.full_like(whole.input_ids_BS, 3),
        doc_ids_BS=torch.arange(whole.doc_ids_BS.numel()).view_as(whole.doc_ids_BS),
        positions_BS=torch.zeros_like(whole.positions_BS),
    )


@cache
def on_one_rank() -> list[tuple[Outcome, Outcome]]:
    kept = invariance.MODEL, invariance.E
    try:
        return cases(0, 1, None)
    finally:
        invariance.MODEL, invariance.E = kept


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_gradient_and_update_is_that_of_one_process(name):
    world, layout = LAYOUTS[name]
    results = run_ranks(cases, world, layout, timeout=100)
    for result in results:
        for router, found, expected in zip(ROUTER_NAMES, result, on_one_rank(), strict=True):
            for one, other in zip(expected, found, strict=True):
                assert_same(one, other, trivial=TRIVIAL.get(router, ""))
