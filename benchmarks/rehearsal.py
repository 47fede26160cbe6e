"""A training step with shapes alone: what waits for values elsewhere is known here, or not asked.

Shapes: T tokens, E experts overall, e experts here, K choices a token, P ranks of ep, N assignments; M nodes,
L ranks of a node, C = 1 + e (distinct rows, assignments of each expert), W columns of what is read.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from moetrain.errors import UserError
from moetrain.moe import MoELayer, RouterContext, Routing
from moetrain.moe.assignment import Assignment
from moetrain.moe.dispatch.all_to_all import AllToAllDispatcher
from moetrain.moe.dispatch.collectives import Exchange
from moetrain.moe.dispatch.hierarchical import HierarchicalDispatcher
from moetrain.moe.dispatch.local import LocalDispatcher, LocalWork
from moetrain.moe.routers.topk import TopKRouter
from moetrain.moe.token_choice import Chosen, scores, weigh
from moetrain.ops.local_part import local_part
from moetrain.train.step import TrainStep

Counts = list[list[int]]


def in_turn(assignments: int, num_experts: int) -> list[int]:
    """Assignments of each expert when the first goes to expert 0, the next to 1, and so on around."""
    return [assignments // num_experts + (e < assignments % num_experts) for e in range(num_experts)]


def deal_in_turn(layer: MoELayer) -> None:
    """Experts in turn, whatever the scores; the router keeps its weights, its scores and their gradients.

    The last places of a sequence, of which a layer that predicts further tokens makes nothing, are dealt too.
    Raises UserError for a router that does not choose a fixed number of experts.
    """
    router = layer.router
    if not isinstance(router, TopKRouter):
        name = router.options.name
        raise UserError(f"router={name} fixes no number of rows: use router=topk or one like it")

    def choose(logits_TE: Tensor, forced_TK: Tensor | None = None) -> Chosen:
        assert forced_TK is None  # nothing is replayed here
        places_N = torch.arange(logits_TE.shape[0] * router.top_k, device=logits_TE.device)
        ids_TK = (places_N % router.num_experts).view(-1, router.top_k)
        scores_TE = scores(logits_TE, router.rule)
        return Chosen(ids_TK, weigh(scores_TE, logits_TE, ids_TK, router.rule), scores_TE)

    forward = router.forward

    def of_all(x_TD: Tensor, ctx: RouterContext) -> Routing:
        return forward(x_TD, replace(ctx, valid_T=None))

    router.choose = choose  # type: ignore[method-assign]
    router.forward = of_all  # type: ignore[method-assign]


def tell_counts(layer: MoELayer, tokens: int) -> None:
    """Give the dispatcher the host counts of :func:`deal_in_turn`, which fake tensors cannot.

    Every rank deals alike. Raises UserError for a dispatcher that reads other counts.
    """
    router, dispatcher = layer.router, layer.dispatcher
    assert router.top_k is not None  # deal_in_turn has chosen for it
    if isinstance(dispatcher, AllToAllDispatcher):
        counts_E = in_turn(tokens * router.top_k, router.num_experts)
        dispatcher.exchange = _told(dispatcher.exchange, _straight(dispatcher, counts_E))
    elif isinstance(dispatcher, HierarchicalDispatcher):
        tables = _two_levels(dispatcher, tokens, router.top_k, router.num_experts)
        dispatcher.node = _told(dispatcher.node, tables)
    elif isinstance(dispatcher, LocalDispatcher):
        local, counts = dispatcher.dispatch, tuple(in_turn(tokens * router.top_k, router.num_experts))

        def dispatch(x_TD: Tensor, assignment: Assignment) -> LocalWork:
            return local(x_TD, replace(assignment, host_counts=counts))

        dispatcher.dispatch = dispatch  # type: ignore[method-assign]
    else:
        raise UserError(
            "parallel.dispatcher=all_gather reads counts on the host: set it to all_to_all or hierarchical"
        )


@dataclass(frozen=True)
class _Told(Exchange):
    """Reads ``tables`` whatever the device has."""

    tables: tuple[Counts, ...] = ()

    def on_host(self, name: str, *tables: Tensor) -> list[Counts]:
        return list(self.tables)


def _told(exchange: Exchange, tables: tuple[Counts, ...]) -> _Told:
    return _Told(**{f.name: getattr(exchange, f.name) for f in fields(Exchange)}, tables=tables)


def _straight(dispatcher: AllToAllDispatcher, counts_E: list[int]) -> tuple[Counts, Counts]:
    """What AllToAllDispatcher reads: assignments sent and received, and the stamp."""
    exchange, here, stamp = dispatcher.exchange, dispatcher.placement.per_rank, [0]
    sent = [[*counts_E[p * here : (p + 1) * here], *stamp] for p in range(exchange.size)]
    return sent, [sent[exchange.group.rank()]] * exchange.size


def _two_levels(
    dispatcher: HierarchicalDispatcher, tokens: int, top_k: int, num_experts: int
) -> tuple[Counts, Counts, Counts]:
    """What HierarchicalDispatcher reads: own counts, the nodes' for this one, the node's for this rank."""
    nodes, node = dispatcher.nodes, dispatcher.node
    ids_TK = torch.arange(tokens * top_k).view(-1, top_k) % num_experts
    chosen_TE = F.one_hot(ids_TK, num_experts).sum(1)[
        :, : nodes.size * node.size * dispatcher.placement.per_rank
    ]
    chosen_TMLe = chosen_TE.unflatten(1, (nodes.size, node.size, dispatcher.placement.per_rank))
    rows_ML, rows_M = chosen_TMLe.any(3).sum(0), chosen_TMLe.flatten(2).any(2).sum(0)
    cells_MLC = torch.cat([rows_ML[..., None], chosen_TMLe.sum(0)], 2)
    own_MW = F.pad(torch.cat([rows_M[:, None], cells_MLC.flatten(1)], 1), (0, 1))
    m, place = nodes.group.rank(), node.group.rank()
    near_MW = own_MW[m].expand_as(own_MW)
    far_LW = F.pad(cells_MLC[m, place].repeat(nodes.size), (0, 1)).expand(node.size, -1)
    return own_MW.tolist(), near_MW.tolist(), far_LW.tolist()


class Collectives(TorchDispatchMode):
    """How many collectives of each kind this rank makes, and the bytes of each one's larger buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its own operations come by again, on local tensors
        if func.namespace == "c10d":
            kind = func._schema.name.removeprefix("c10d::").strip("_")
            self.calls[kind] += 1
            self.bytes[kind] += max(nbytes(t) for t in tree_leaves(args) if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


class Tracker(FSDPMemTracker):
    """Without the peak of each module, which costs a look at all modules in every operation."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        modules, self.memory_tracking = self.memory_tracking, WeakIdKeyDictionary()
        super()._update_peak_stats(peak_state)
        self.memory_tracking = modules


class AloneTracker(MemTracker):
    """Of a model that is not sharded; likewise."""

    def __init__(self, task: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.track_external(task, optimizer)

    def _track_module_params_and_buffers(
        self, module: nn.Module, install_grad_hooks: bool = True
    ) -> tuple[int, int]:
        """Nothing while a block sees its parameters rounded: those that they are of are tracked already. No
        hooks, which frozen ones cannot have: gradients count as activations."""
        if not all(isinstance(parameter, nn.Parameter) for parameter in module.parameters()):
            return 0, 0
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)

    def _update_peak_stats(self, peak_state: Any) -> None:
        modules, self.memory_tracking = self.memory_tracking, WeakIdKeyDictionary()
        super()._update_peak_stats(peak_state)
        self.memory_tracking = modules


class Rehearsal(TrainStep):
    """The trainer's step up to the clipped gradients; what it reads on the host is known or left unread."""

    def __init__(self, *args: Any, world: int) -> None:
        super().__init__(*args)
        self.world = world

    def _global_counts(self, batches: Any) -> tuple[int, int]:
        tokens = self.world * sum(b.input_ids_BS.numel() for b in batches)
        self._future.start([tokens] * (2 * len(self._future.places)))
        return tokens, tokens

    def _finish(self, *args: Any) -> None:  # type: ignore[override]
        if self.clip_norm is not None:
            self.engine.clip(self.clip_norm)


def nbytes(tensor: Tensor) -> int:
    """Bytes on this rank."""
    return local_part(tensor).nbytes
