"""Routing: the one value that every router returns, and the only thing the layers below it see.

Shapes: T tokens (B sequences of S, flattened), E experts overall, N assignments (any number),
B sequences. Assignments are sorted by (expert, token).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moetrain.moe.assignment import Assignment


@dataclass(frozen=True)
class Routing:
    """Which token goes to which expert, and with which weight. Immutable; a pytree.

    token_ids_N   int64, the token of each assignment, sorted by (expert, token).
    weights_N     at least fp32, differentiable: what multiplies the expert's output.
    counts_E      int64, assignments of each expert; sums to N.
    num_tokens_B  int64, valid (unpadded) tokens of each sequence.
    demand_BE     int64, assignments that the router wanted per sequence and expert, before any capacity.
    scores_TE     at least fp32: the router's affinities, for losses and metrics.
    logits_TE     at least fp32: what the scores were made of.
    valid_T       bool, or None where every token is valid.
    forward_scale_N  multiplies the expert's output in the forward pass only (gradient estimators).
    choice_N      int64, the rank of each assignment among its token's (0: the first choice), or None.
    load_TE       differentiable probability that the token picks the expert (noisy routers), or None.
    repaired_E    int64, assignments among ``counts_E`` that a repair added and ``demand_BE`` lacks, or None.
    stats         detached sums over tokens that the router's ``after_step`` wants of the whole step, or None.
    price_E       what a balance loss multiplies an expert's term with; capacities go by its inverse. None: 1.
    penalty       a scalar of the router's own parameters for the loss ``penalty``, or None.
    num_ffn_experts  experts from this number up do without a feed-forward network: they are the last, and
                  never dispatched (``zero_experts.py``). None: there are no such experts.
    host_counts   ``counts_E`` as host integers, of a router that had to wait for them; None: it did not.
    """

    token_ids_N: Tensor
    weights_N: Tensor
    counts_E: Tensor
    num_tokens_B: Tensor
    demand_BE: Tensor
    scores_TE: Tensor | None = None
    logits_TE: Tensor | None = None
    valid_T: Tensor | None = None
    forward_scale_N: Tensor | None = None
    choice_N: Tensor | None = None
    load_TE: Tensor | None = None
    stats: Tensor | None = None
    repaired_E: Tensor | None = None
    price_E: Tensor | None = None
    penalty: Tensor | None = None
    num_ffn_experts: int | None = None
    host_counts: tuple[int, ...] | None = None

    @property
    def num_experts(self) -> int:
        return self.counts_E.shape[0]

    @property
    def assignment(self) -> Assignment:
        """What dispatchers read."""
        return Assignment(
            self.token_ids_N,
            self.weights_N,
            self.counts_E,
            self.forward_scale_N,
            self.choice_N,
            self.num_ffn_experts,
            self.host_counts,
        )

    @property
    def demand_E(self) -> Tensor:
        """Assignments wanted per expert, before any capacity."""
        return self.demand_BE.sum(0)

    @property
    def granted_E(self) -> Tensor:
        """Assignments that capacity left of the demand: ``counts_E`` without what a repair added."""
        return self.counts_E if self.repaired_E is None else self.counts_E - self.repaired_E

    @property
    def num_tokens(self) -> Tensor:
        """Valid tokens, a scalar."""
        return self.num_tokens_B.sum()

    def counts_on_host(self) -> list[int]:
        """``counts_E`` as host integers: one host synchronisation, unless the router made it already."""
        counts: list[int] = self.counts_E.tolist() if self.host_counts is None else list(self.host_counts)
        return counts

    def expert_ids_N(self) -> Tensor:
        """The expert of each assignment, int64, non-decreasing."""
        experts_E = torch.arange(self.num_experts, device=self.counts_E.device)
        return torch.repeat_interleave(experts_E, self.counts_E, output_size=self.token_ids_N.shape[0])

    def detach(self) -> Routing:
        """The same routing without its autograd graph: what metrics and controllers may keep."""
        return replace(
            self, **{name: t.detach() for name in _TENSORS if (t := getattr(self, name)) is not None}
        )

    def check(self) -> None:
        """Raise ValueError unless the invariants hold: for tests and for a user's own router."""
        check_routing(self)


_HOST = ("num_ffn_experts", "host_counts")
_TENSORS = tuple(f.name for f in fields(Routing) if f.name not in _HOST)


def check_routing(r: Routing) -> None:
    """Raise ValueError naming the first broken invariant of ``r``."""
    n, num_tokens = r.token_ids_N.shape[0], int(r.num_tokens)
    if int(r.counts_E.sum()) != n:
        raise ValueError(f"counts_E sums to {int(r.counts_E.sum())}, but there are {n} assignments")
    if r.host_counts is not None and list(r.host_counts) != r.counts_E.tolist():
        raise ValueError(f"host_counts={r.host_counts} are not counts_E={r.counts_E.tolist()}")
    if r.weights_N.shape != (n,):
        raise ValueError(f"weights_N has shape {tuple(r.weights_N.shape)}, expected ({n},)")
    if r.weights_N.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weights_N is {r.weights_N.dtype}, expected fp32 or fp64")
    for name in ("forward_scale_N", "choice_N"):
        value = getattr(r, name)
        if value is not None and value.shape != (n,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected ({n},)")
    if not bool(torch.isfinite(r.weights_N).all()):
        raise ValueError("weights_N is not finite")
    if r.num_ffn_experts is not None and not 0 <= r.num_ffn_experts <= r.num_experts:
        raise ValueError(f"num_ffn_experts={r.num_ffn_experts} of {r.num_experts} experts")
    if r.demand_BE.shape != (r.num_tokens_B.shape[0], r.num_experts):
        raise ValueError(f"demand_BE has shape {tuple(r.demand_BE.shape)}")
    if bool((r.granted_E > r.demand_E).any()):
        raise ValueError("an expert has more assignments than its demand")
    if bool((r.granted_E < 0).any() | (r.granted_E > r.counts_E).any()):
        raise ValueError("an expert has fewer repaired assignments than 0, or more than assignments")
    if n:
        size = int(r.token_ids_N.max()) + 1 + num_tokens
        key_N = r.expert_ids_N() * size + r.token_ids_N
        if bool((key_N[1:] <= key_N[:-1]).any()):
            raise ValueError("assignments are not sorted by (expert, token), or one occurs twice")
        if r.valid_T is not None and not bool(r.valid_T[r.token_ids_N].all()):
            raise ValueError("a padding token is assigned to an expert")


def _flatten(r: Routing) -> tuple[list[Any], tuple[Any, ...]]:
    return [getattr(r, name) for name in _TENSORS], tuple(getattr(r, name) for name in _HOST)


def _unflatten(values: Any, context: tuple[Any, ...]) -> Routing:
    return Routing(**dict(zip((*_TENSORS, *_HOST), (*values, *context), strict=True)))


pytree.register_pytree_node(
    Routing, _flatten, _unflatten, serialized_type_name="moetrain.moe.routing.Routing"
)
