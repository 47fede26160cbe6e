"""A training step with shapes alone: what waits for values elsewhere is known here, or not asked.

Shapes: T tokens, E experts overall, e experts here, K choices a token, P ranks of ep, N assignments.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moetrain.errors import UserError
from moetrain.moe import MoELayer
from moetrain.moe.all_to_all import AllToAllDispatcher
from moetrain.moe.exchange import Exchange
from moetrain.moe.routers.topk import TopKRouter
from moetrain.ops.local_part import local_part
from moetrain.parallel.clip import clip_
from moetrain.train.step import TrainStep

Counts = list[list[int]]


def in_turn(assignments: int, num_experts: int) -> list[int]:
    """Assignments of each expert when the first goes to expert 0, the next to 1, and so on around."""
    return [assignments // num_experts + (e < assignments % num_experts) for e in range(num_experts)]


def deal_in_turn(layer: MoELayer) -> None:
    """Experts in turn, whatever the scores; the router keeps its weights, its scores and their gradients.

    Raises UserError for a router that does not choose a fixed number of experts.
    """
    router = layer.router
    if not isinstance(router, TopKRouter):
        name = router.options.name
        raise UserError(f"router={name} fixes no number of rows: use router=topk or one like it")

    def select(scores_TE: Tensor) -> Tensor:
        places_N = torch.arange(scores_TE.shape[0] * router.top_k, device=scores_TE.device)
        return (places_N % router.num_experts).view(-1, router.top_k)

    router._select = select  # type: ignore[method-assign]


def tell_counts(layer: MoELayer, tokens: int) -> None:
    """Give the dispatcher the host counts of :func:`deal_in_turn`, which fake tensors cannot."""
    router, dispatcher = layer.router, layer.dispatcher
    if not isinstance(dispatcher, AllToAllDispatcher):
        raise UserError("parallel.ep=1 reads counts on the host: set parallel.ep to 2 or more")
    counts_E = in_turn(tokens * router.top_k, router.num_experts)
    known = {field.name: getattr(dispatcher.exchange, field.name) for field in fields(Exchange)}
    dispatcher.exchange = _Told(**known, counts_E=tuple(counts_E))


@dataclass(frozen=True)
class _Told(Exchange):
    """Every rank sends ``counts_E`` rows to the experts."""

    counts_E: tuple[int, ...] = ()

    def on_host(self, *counts_Pf: Tensor) -> list[Counts]:
        ranks, here = counts_Pf[0].shape[0], counts_Pf[0].shape[1] - 1
        stamp = [0]
        sent = [[*self.counts_E[p * here : (p + 1) * here], *stamp] for p in range(ranks)]
        return [sent, [list(sent[self.group.rank()]) for _ in range(ranks)]]


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
        modules, self.memory_tracking = self.memory_tracking, {}
        super()._update_peak_stats(peak_state)
        self.memory_tracking = modules


class Rehearsal(TrainStep):
    """The trainer's step up to the clipped gradients; what it reads on the host is known or left unread."""

    def __init__(self, *args: Any, world: int) -> None:
        super().__init__(*args)
        self.world = world

    def _global_counts(self, batches: Any) -> tuple[int, int]:
        tokens = self.world * sum(b.input_ids_BS.numel() for b in batches)
        return tokens, tokens

    def _finish(self, *args: Any) -> None:  # type: ignore[override]
        if self.clip_norm is not None:
            clip_(self.task.parameters(), self.clip_norm)


def nbytes(tensor: Tensor) -> int:
    """Bytes on this rank."""
    return local_part(tensor).nbytes
