"""An MoE layer spread over ranks with a given routing, and an observer that counts what its dispatch sends.

Shapes: T tokens of a rank, K choices, E experts, P ranks, D model.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.moe import MoELayer, RouterContext, Routing
from moetrain.moe.assign import from_token_choice
from moetrain.moe.dispatch.collectives import Collective, Observer
from moetrain.moe.routers.base import Router
from moetrain.parallel.apply import parallelize
from moetrain.parallel.mesh import build_meshes
from moetrain.parallel.options import ExpertDispatch, ParallelConfig

ROUTINGS = ("uniform", "zipf", "one expert")


def dispatchers(ep: int, ranks_per_node: int) -> dict[str, ParallelConfig]:
    hierarchical = ExpertDispatch.hierarchical
    return {
        "all_to_all": ParallelConfig(ep=ep),
        "all_to_all, overlap 2": ParallelConfig(ep=ep, overlap=2),
        "hierarchical": ParallelConfig(ep=ep, dispatcher=hierarchical, ranks_per_node=ranks_per_node),
        "hierarchical, node_sums=false": ParallelConfig(
            ep=ep, dispatcher=hierarchical, ranks_per_node=ranks_per_node, node_sums=False
        ),
        "all_gather": ParallelConfig(ep=ep, dispatcher=ExpertDispatch.all_gather),
    }


def draw(routing: str, rank: int, tokens: int, top_k: int, experts: int) -> Tensor:
    """Each token's K different experts, int64 [T, K]. ``one expert``: the same K for all."""
    if routing == "one expert":
        return torch.arange(top_k).expand(tokens, -1)
    share_E = torch.ones(experts)
    if routing == "zipf":  # which expert is how popular is drawn once, and the same on all ranks
        order_E = torch.randperm(experts, generator=torch.Generator().manual_seed(0))
        share_E = 1 / (1 + order_E.float())
    return torch.multinomial(
        share_E.expand(tokens, -1), top_k, generator=torch.Generator().manual_seed(rank + 1)
    )


class Given(nn.Module):
    """A router whose choices are given; its weights depend on its input, so gradients flow."""

    zero_experts = None
    usual_rows_per_token = None

    def __init__(self, ids_TK: Tensor, d_model: int, experts: int) -> None:
        super().__init__()
        self.ids_TK = ids_TK
        self.weight_ED = nn.Parameter(torch.randn(experts, d_model) * d_model**-0.5)

    def forward(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        scores_TE = (x_TD @ self.weight_ED.t()).softmax(-1)
        experts = self.weight_ED.shape[0]
        return from_token_choice(self.ids_TK, scores_TE.gather(1, self.ids_TK), ctx, experts)


class Block(nn.Module):
    """x plus the layer's output."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_BSD: Tensor) -> Tensor:
        return x_BSD + self.layer(x_BSD)[0]


class Stack(nn.Module):
    """One block where ``parallelize`` looks for blocks."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])


def spread_block(
    cfg: ParallelConfig, ids_TK: Tensor, d_model: int, d_ff: int, experts: int, observer: Observer
) -> nn.Module:
    torch.manual_seed(0)
    layer = MoELayer(d_model, d_ff, experts)
    layer.router = cast(Router, Given(ids_TK, d_model, experts))
    meshes = build_meshes(cfg, dist.get_world_size())
    stack = parallelize(Stack(Block(layer)), meshes, observer=observer)
    return stack.blocks[0]


class Tally:
    """Bytes that this rank sends to other ranks inside its node and across, collectives, and host reads.

    A collective counts as if every rank sent straight to every other, whatever its algorithm does.
    """

    def __init__(self, ranks_per_node: int) -> None:
        self.ranks_per_node = ranks_per_node
        self.counts: Counter[str] = Counter()

    def __call__(self, collective: Collective) -> AbstractContextManager[object]:
        if not collective.sent and collective.kind != "all_to_all":  # a host read, or FSDP2's own
            self.counts["host"] += collective.kind == "host"
            return nullcontext()
        self.counts["collectives"] += 1
        own = dist.get_rank()
        peers = dist.get_process_group_ranks(collective.group)
        for peer, rows in zip(peers, collective.sent or [1] * len(peers), strict=True):
            if peer != own:
                near = peer // self.ranks_per_node == own // self.ranks_per_node
                self.counts["inside" if near else "across"] += rows * collective.row_bytes
        return nullcontext()


def lower_bound(ids_TK: Tensor, experts: int, ranks_per_node: int, row_bytes: int) -> dict[str, int]:
    """Bytes of this rank's tokens, forward and backward: four times a row reaches each node and rank once.

    Rows, results, and the gradients of both. What a rank gets that way is counted inside, but for the first
    of another node.
    """
    world, own = dist.get_world_size(), dist.get_rank()
    here_TP = torch.zeros(ids_TK.shape[0], world, dtype=torch.bool)
    here_TP.scatter_(1, ids_TK // (experts // world), True)
    here_TP[:, own] = False
    nodes_TM = here_TP.unflatten(1, (-1, ranks_per_node)).any(2)
    nodes_TM[:, own // ranks_per_node] = False
    across = int(nodes_TM.sum())
    return {"across": 4 * across * row_bytes, "inside": 4 * (int(here_TP.sum()) - across) * row_bytes}
