"""The output of a router: the assignment, which dispatchers read, and the record, which all else reads.

Shapes: T tokens (B sequences of S, flattened), E experts overall, N assignments, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moetrain.moe.assignment import Assignment


@dataclass(frozen=True, kw_only=True)
class RoutingRecord:
    """The routing figures of one layer, for losses, metrics and controllers. Immutable; a pytree.

    A layer that mixes its experts without an assignment of tokens returns a record alone.

    num_tokens_B  int64, valid (unpadded) tokens of each sequence.
    demand_BE     int64, assignments that the router wanted per sequence and expert, before any capacity.
    scores_TE     at least fp32: the router's affinities.
    logits_TE     at least fp32: what the scores were made of.
    valid_T       bool, or None where every token is valid.
    load_TE       differentiable probability that the token picks the expert (noisy routers), or None.
    stats         detached sums over tokens for the router's ``after_step``, or None.
    price_E       the factor of an expert's term in balance losses; capacities divide by it. None: 1.
    penalty       for the loss ``penalty``, or None: a scalar of the router's own parameters, or a mean over
                  this micro-batch's valid tokens.
    domain_ids_T  int64, the index of each token's domain among the corpus's, or None: not known.
    choices_TE    whether the token chose the expert, 1 or 0, with the gradient of a router that passes one
                  straight through its choices, or None.
    width_E       int64, hidden units of each expert, of a layer whose experts differ; else None.
    """

    num_tokens_B: Tensor
    demand_BE: Tensor
    scores_TE: Tensor | None = None
    logits_TE: Tensor | None = None
    valid_T: Tensor | None = None
    load_TE: Tensor | None = None
    stats: Tensor | None = None
    price_E: Tensor | None = None
    penalty: Tensor | None = None
    choices_TE: Tensor | None = None
    domain_ids_T: Tensor | None = None
    width_E: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.demand_BE.shape[1]

    @property
    def demand_E(self) -> Tensor:
        """Assignments wanted per expert, before any capacity."""
        return self.demand_BE.sum(0)

    @property
    def computed_E(self) -> Tensor:
        """Assignments that each expert computes: without a dispatch, all that are wanted."""
        return self.demand_E

    @property
    def granted_E(self) -> Tensor:
        """The part of the demand that capacity granted, without the assignments that a repair added."""
        return self.demand_E

    @property
    def num_tokens(self) -> Tensor:
        """Valid tokens, a scalar."""
        return self.num_tokens_B.sum()

    def weights_BE(self, num_tokens: int) -> Tensor:
        """Sums of combine weights per sequence and expert, differentiable; ``num_tokens`` is B S.

        Raises ValueError for a layer that assigns nothing.
        """
        raise ValueError("this layer assigns nothing, so it has no combine weights")

    def detach(self) -> RoutingRecord:
        """A copy without an autograd graph, which metrics and controllers may keep."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value.detach() for name, value in given.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class Routing(RoutingRecord):
    """The record of a router, with its assignment.

    repaired_E  int64, assignments that a repair added and ``demand_BE`` lacks, or None.
    """

    assignment: Assignment
    repaired_E: Tensor | None = None

    @property
    def computed_E(self) -> Tensor:
        return self.assignment.counts_E

    @property
    def granted_E(self) -> Tensor:
        counts_E = self.assignment.counts_E
        return counts_E if self.repaired_E is None else counts_E - self.repaired_E

    def weights_BE(self, num_tokens: int) -> Tensor:
        a, (batch, num_experts) = self.assignment, self.demand_BE.shape
        seq = max(num_tokens // max(batch, 1), 1)
        cell_N = a.token_ids_N // seq * num_experts + a.expert_ids_N()
        sums = a.weights_N.new_zeros(batch * num_experts).index_add(0, cell_N, a.weights_N)
        return sums.view(batch, num_experts)

    def check(self) -> None:
        """Raise ValueError unless the invariants hold: for tests and for a user's own router."""
        check_routing(self)


def check_routing(r: Routing) -> None:
    """Raise ValueError naming the first broken invariant of ``r``."""
    _check_assignment(r.assignment)
    a, num_tokens = r.assignment, int(r.num_tokens)
    if r.demand_BE.shape != (r.num_tokens_B.shape[0], a.num_experts):
        raise ValueError(f"demand_BE has shape {tuple(r.demand_BE.shape)}")
    if bool((r.granted_E > r.demand_E).any()):
        raise ValueError("an expert has more assignments than its demand")
    if bool((r.granted_E < 0).any() | (r.granted_E > a.counts_E).any()):
        raise ValueError("an expert has fewer repaired assignments than 0, or more than assignments")
    if a.token_ids_N.shape[0]:
        size = int(a.token_ids_N.max()) + 1 + num_tokens
        key_N = a.expert_ids_N() * size + a.token_ids_N
        if bool((key_N[1:] <= key_N[:-1]).any()):
            raise ValueError("assignments are not sorted by (expert, token), or one occurs twice")
        if r.valid_T is not None and not bool(r.valid_T[a.token_ids_N].all()):
            raise ValueError("a padding token is assigned to an expert")


def _check_assignment(a: Assignment) -> None:
    n = a.token_ids_N.shape[0]
    if int(a.counts_E.sum()) != n:
        raise ValueError(f"counts_E sums to {int(a.counts_E.sum())}, but there are {n} assignments")
    if a.host_counts is not None and list(a.host_counts) != a.counts_E.tolist():
        raise ValueError(f"host_counts={a.host_counts} are not counts_E={a.counts_E.tolist()}")
    if a.weights_N.shape != (n,):
        raise ValueError(f"weights_N has shape {tuple(a.weights_N.shape)}, expected ({n},)")
    if a.weights_N.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weights_N is {a.weights_N.dtype}, expected fp32 or fp64")
    for name in ("forward_scale_N", "choice_N"):
        value = getattr(a, name)
        if value is not None and value.shape != (n,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected ({n},)")
    if not bool(torch.isfinite(a.weights_N).all()):
        raise ValueError("weights_N is not finite")
    if a.num_ffn_experts is not None and not 0 <= a.num_ffn_experts <= a.num_experts:
        raise ValueError(f"num_ffn_experts={a.num_ffn_experts} of {a.num_experts} experts")


def register_record(cls: type[RoutingRecord]) -> None:
    """Make a record a pytree; a subclass with fields of its own needs it too."""
    names = tuple(f.name for f in fields(cls))

    def flatten(r: RoutingRecord) -> tuple[list[Any], None]:
        return [getattr(r, name) for name in names], None

    def unflatten(values: Any, _: None) -> RoutingRecord:
        return cls(**dict(zip(names, values, strict=True)))

    name = f"{cls.__module__}.{cls.__name__}"
    pytree.register_pytree_node(cls, flatten, unflatten, serialized_type_name=name)


register_record(RoutingRecord)
register_record(Routing)
