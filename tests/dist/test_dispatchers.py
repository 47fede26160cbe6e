"""Every dispatcher against the flat one and against one process: output and all gradients of a layer.

Shapes: T tokens of a rank, D model, E experts, P ranks.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import invariance
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moetrain.moe import MoELayer, RouterContext
from moetrain.moe.dispatch.all_gather import AllGatherDispatcher
from moetrain.moe.dispatch.all_to_all import AllToAllDispatcher
from moetrain.moe.dispatch.collectives import Collective, Exchange, Observer, unobserved
from moetrain.moe.dispatch.hierarchical import HierarchicalDispatcher
from moetrain.moe.dispatch.placement import Placement
from moetrain.parallel.mesh import Meshes, build_meshes
from moetrain.parallel.options import ExpertDispatch, ParallelConfig
from moetrain.parallel.ranks import run_ranks

# Blocks of rows and matrices are multiples of 64 bytes: products round by where their operands lie.
D, F, E, P, BLOCK = 7, 8, 12, 4, 32
DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """``tokens`` of each rank; all of them prefer the ``hot`` experts."""

    router: str = "topk"
    options: dict[str, Any] = field(default_factory=dict)
    tokens: tuple[int, ...] = (7, 0, 5, 13)
    hot: tuple[int, ...] = ()
    shared: int = 0
    bound: int | None = None
    recompute: bool = False
    autocast: bool = False  # of fp32


CASES = {
    "top 1": Case(options={"top_k": 1, "renormalize": False}),
    "top 8": Case(options={"top_k": 8}, shared=1, recompute=True),
    "two experts, on the two nodes": Case(options={"top_k": 2}, hot=(4, 10)),
    "one expert": Case(options={"top_k": 1, "renormalize": False}, hot=(11,), tokens=(3, 5, 2, 7)),
    "ragged": Case("relu", recompute=True),
    "forward scale": Case("sparsemixer2", tokens=(5, 3, 0, 11)),
    "zero-computation experts": Case("moepp", shared=1, tokens=(11, 5, 7, 0)),
    "rounds": Case(options={"top_k": 3}, bound=5),
    "rounds, scaled": Case("sparsemixer2", bound=7, shared=1),
    "bf16": Case(options={"top_k": 3}, shared=1, autocast=True),
    "no tokens at all": Case(options={"top_k": 2}, tokens=(0, 0, 0, 0)),
}
FLAT = "flat"
SAME_BITS = ("overlap 2", "overlap 3", "two nodes, unsummed", "one node, unsummed", "four nodes, unsummed")
CLOSE = ("two nodes", "one node", "four nodes", "all-gather")
PLACED = ("placed, overlap 2", "placed, two nodes", "placed, all-gather")  # experts lie elsewhere
ELSEWHERE = Placement(P, (5, 0, 11, 7, 2, 9, 4, 1, 8, 10, 3, 6))


def layer_of(case: Case) -> MoELayer:
    torch.manual_seed(5)
    layer = MoELayer(
        D, F, E, case.router, case.options, num_shared_experts=case.shared, block=BLOCK,
        max_rows_per_rank=case.bound,
    )  # fmt: skip
    layer = layer.float() if case.autocast else layer.double()
    layer.router.usual_rows_per_token = None
    if case.hot:
        with torch.no_grad():
            layer.router.weight_ED[:, 0] = 0
            layer.router.weight_ED[list(case.hot), 0] = 40
    return layer


def input_of(case: Case, rank: int) -> tuple[Tensor, RouterContext]:
    """x [1, T, D], whose first feature is 1."""
    draw = torch.Generator().manual_seed(rank)
    x_BSD = torch.randn(1, case.tokens[rank], D, generator=draw, dtype=torch.float64)
    x_BSD[..., 0] = 1
    return x_BSD, RouterContext(1, case.tokens[rank], torch.tensor([rank + 9]), seed=3)


def outcome(layer: MoELayer, case: Case, rank: int) -> dict[str, Tensor]:
    """The layer's output, and the gradients of its input and of every parameter."""
    x_BSD, ctx = input_of(case, rank)
    x_BSD = x_BSD.to(layer.router.weight_ED.dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        if case.recompute:
            y_BSD, _ = checkpoint(layer, x_BSD, ctx, use_reentrant=False)
        else:
            y_BSD, _ = layer(x_BSD, ctx)
    (y_BSD * torch.linspace(-1, 2, y_BSD.numel(), dtype=y_BSD.dtype).view_as(y_BSD)).sum().backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in layer.named_parameters()}
    return {"y": y_BSD.detach(), "x": x_BSD.grad, **grads}


def spread(layer: MoELayer, rank: int, placement: Placement) -> None:
    """Leave the experts of this rank."""
    for name, parameter in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, nn.Parameter(parameter.detach()[list(placement.of_rank(rank))]))


def dispatchers(rank: int, observer: Observer = unobserved) -> dict[str, Any]:
    whole = Exchange(dist.group.WORLD, observer=observer)
    contiguous = Placement.contiguous(E, P)
    made: dict[str, Any] = {FLAT: AllToAllDispatcher(whole, contiguous, DEVICE, BLOCK)}
    for chunks in (2, 3):
        made[f"overlap {chunks}"] = AllToAllDispatcher(whole, contiguous, DEVICE, BLOCK, overlap=chunks)
    for name, places in (("two nodes", 2), ("one node", 4), ("four nodes", 1)):
        nodes = [dist.new_group(list(range(place, P, places))) for place in range(places)]
        node = [dist.new_group(list(range(n, n + places))) for n in range(0, P, places)]
        levels = whole.over(nodes[rank % places]), whole.over(node[rank // places])
        world = dist.group.WORLD
        made[name] = HierarchicalDispatcher(*levels, world, contiguous, DEVICE, BLOCK)
        made[f"{name}, unsummed"] = HierarchicalDispatcher(*levels, world, contiguous, DEVICE, BLOCK, False)
        if name == "two nodes":
            made[f"placed, {name}"] = HierarchicalDispatcher(*levels, world, ELSEWHERE, DEVICE, BLOCK)
    made["all-gather"] = AllGatherDispatcher(whole, contiguous, DEVICE, BLOCK)
    made["placed, all-gather"] = AllGatherDispatcher(whole, ELSEWHERE, DEVICE, BLOCK)
    made["placed, overlap 2"] = AllToAllDispatcher(whole, ELSEWHERE, DEVICE, BLOCK, overlap=2)
    return made


def every_outcome(rank: int, world: int) -> dict[tuple[str, str], dict[str, Tensor]]:
    found = {}
    for variant, dispatcher in dispatchers(rank).items():
        for name, case in CASES.items():
            layer = layer_of(case)
            spread(layer, rank, dispatcher.placement)
            layer.dispatcher = dispatcher
            found[name, variant] = outcome(layer, case, rank)
    return found


@cache
def outcomes() -> list[dict[tuple[str, str], dict[str, Tensor]]]:
    return run_ranks(every_outcome, P, timeout=120)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", SAME_BITS)
def test_the_same_bits_as_the_flat_one(variant, name):
    for found in outcomes():
        for key, expected in found[name, FLAT].items():
            assert torch.equal(found[name, variant][key], expected), key


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", [FLAT, *CLOSE, *PLACED])
def test_as_on_one_process(variant, name):
    """Each rank's tokens by themselves, through all experts; gradients of weights add up over the ranks."""
    case = CASES[name]
    close = {"rtol": 0.02, "atol": 0.02} if case.autocast else {"rtol": 0, "atol": 1e-12}
    alone = [outcome(layer_of(case), case, rank) for rank in range(P)]
    found = [each[name, variant] for each in outcomes()]
    for key in alone[0]:
        if key.startswith("experts."):
            expected, there = sum(one[key] for one in alone), torch.cat([one[key] for one in found])
            expected = expected[list(ELSEWHERE.experts)] if variant in PLACED else expected
            assert expected.any() or not sum(case.tokens)
            torch.testing.assert_close(there, expected, **close)
        else:
            for one, other in zip(found, alone, strict=True):
                torch.testing.assert_close(one[key], other[key], **close)


def events_of(rank: int, world: int) -> dict[str, list[tuple[str, Collective | str]]]:
    """What happens in a layer with shared experts, forward and backward: told, waited for, computed."""
    events: list[tuple[str, Any]] = []

    def observer(collective: Collective) -> Any:
        told = (collective.name, collective.kind, collective.group.size(), list(collective.sent))
        events.append(("made", told))

        @contextmanager
        def waiting() -> Any:
            events.append(("waits", told))
            yield

        return waiting()

    found = {}
    case = Case(options={"top_k": 8}, shared=1)
    for variant, dispatcher in dispatchers(rank, observer).items():
        layer = layer_of(case)
        spread(layer, rank, dispatcher.placement)
        layer.dispatcher = dispatcher

        def shared_computed(_: nn.Module, __: Any, y: Tensor) -> None:
            events.append(("computed", ("shared",)))
            y.register_hook(lambda _: events.append(("computed", ("shared, backward",))))

        layer.shared.register_forward_hook(shared_computed)
        events.clear()
        outcome(layer, case, rank)
        found[variant] = list(events)
    x_BSD, ctx = input_of(case, rank)
    found["routing"] = layer.router(x_BSD.view(-1, D), ctx).detach()
    return found


@cache
def events() -> list[dict[str, Any]]:
    return run_ranks(events_of, P, timeout=120)


@pytest.mark.parametrize("variant", [FLAT, *SAME_BITS, *CLOSE, *PLACED])
def test_one_host_wait_and_others_compute_while_rows_travel(variant):
    levels = 2 if "node" in variant else 1
    for found in events():
        seen = [(what, told[0]) for what, told in found[variant]]
        assert [told[1] for what, told in found[variant] if what == "made"].count("host") == 1
        assert (
            seen.index(("made", "rows")) < seen.index(("computed", "shared")) < seen.index(("waits", "rows"))
        )
        last = {event: place for place, event in enumerate(seen)}
        gradients = "rows' gradients"
        shared = last["computed", "shared, backward"]
        assert last["made", gradients] < shared < last["waits", gradients]
        chunks = int(variant[-1]) if "overlap" in variant else 1
        for name in ("rows", "results", "results' gradients", "rows' gradients"):
            assert seen.count(("made", name)) == seen.count(("waits", name)) == levels * chunks, name
        assert len([what for what, _ in seen if what == "made"]) == 1 + levels * (3 + 4 * chunks)


@pytest.mark.parametrize("chunks", [2, 3])
def test_chunks_travel_while_others_compute_forward_and_backward(chunks):
    """Results of a chunk leave before the next is waited for, in both passes."""
    for found in events():
        seen = [(what, told[0]) for what, told in found[f"overlap {chunks}"]]
        for there, back in (("rows", "results"), ("results' gradients", "rows' gradients")):
            order = [
                x for x in seen if x in {("made", there), ("waits", there), ("made", back), ("waits", back)}
            ]
            expected = [("made", there)] * chunks + [("waits", there), ("made", back)] * chunks
            assert order == expected + [("waits", back)] * chunks


def test_a_row_crosses_to_a_node_once_and_comes_back_once():
    """With top 8 of 12 experts; unsummed, what comes back is one row an assignment."""
    for rank, found in enumerate(events()):
        routing = found["routing"]
        nodes_N = routing.assignment.expert_ids_N() // (E // 2)
        pairs = {(int(t), int(n)) for t, n in zip(routing.assignment.token_ids_N, nodes_N, strict=True)}
        there = 1 - rank // 2
        distinct = sum(node == there for _, node in pairs)
        first = {told[0]: told[3] for what, told in reversed(found["two nodes"]) if what == "made"}
        assert first["rows"][there] == first["results' gradients"][there] == distinct
        assert int((nodes_N == there).sum()) >= distinct
    sent = [dict.fromkeys(("results", "rows' gradients"), 0) for _ in range(2)]
    for found in events():
        for total, variant in zip(sent, ("two nodes", "two nodes, unsummed"), strict=True):
            for name in total:
                told = [t for what, t in found[variant] if what == "made" and t[0] == name]
                total[name] += sum(told[-1][3])  # between the nodes: the second of two
    routings = [found["routing"] for found in events()]
    assert (
        sent[1]["results"]
        == sent[1]["rows' gradients"]
        == sum(int(r.assignment.counts_E.sum()) for r in routings)
    )
    assert sent[0]["results"] == sent[0]["rows' gradients"] == 2 * sum(CASES["top 8"].tokens)


LAYOUTS = {
    "ep 4, two nodes": ParallelConfig(ep=4, dispatcher=ExpertDispatch.hierarchical, ranks_per_node=2),
    "ep 2 x efsdp 2, two nodes": ParallelConfig(
        ep=2, dispatcher=ExpertDispatch.hierarchical, ranks_per_node=1
    ),
    "ep 2 x efsdp 2, overlap 3": ParallelConfig(ep=2, overlap=3),
    "hsdp 2 x ep 2, all-gather": ParallelConfig(2, ep=2, dispatcher=ExpertDispatch.all_gather),
}


def step_of_each_layout(rank: int, world: int) -> list[invariance.Outcome]:
    """The gradients of a recomputed model in several micro-batches."""
    layouts = [build_meshes(cfg, world) for cfg in LAYOUTS.values()] if world > 1 else [Meshes()]
    kept = invariance.MODEL, invariance.E
    try:
        invariance.MODEL, invariance.E = replace(invariance.MODEL, num_experts=8), 8
        losses = invariance.terms("switch", "global_batch")
        return [invariance.gradients(losses, 1, True, rank, world, meshes) for meshes in layouts]
    finally:
        invariance.MODEL, invariance.E = kept


def test_a_sharded_recomputed_model_has_one_processs_gradients():
    (alone,) = step_of_each_layout(0, 1)
    for found in run_ranks(step_of_each_layout, P, timeout=120):
        for one in found:
            invariance.assert_same(alone, one)
