"""Assignment: which token goes to which expert, and with which weight. All that dispatchers read.

Shapes: T tokens, E experts overall, N assignments (any number), n of them selected.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Assignment:
    """Sorted by (expert, token). Immutable; a pytree.

    token_ids_N   int64, the token of each assignment.
    weights_N     at least fp32, differentiable: what multiplies the expert's output.
    counts_E      int64, assignments of each expert; sums to N.
    forward_scale_N  multiplies the expert's output in the forward pass only (gradient estimators), or None.
    choice_N      int64, the rank of each assignment among its token's (0: the first choice), or None.
    num_ffn_experts  experts from this number up have no feed-forward network: they are the last, and never
                  dispatched (``zero_experts.py``). None: there are no such experts.
    host_counts   ``counts_E`` as host integers, of a router that had to wait for them; None: it did not.
    """

    token_ids_N: Tensor
    weights_N: Tensor
    counts_E: Tensor
    forward_scale_N: Tensor | None = None
    choice_N: Tensor | None = None
    num_ffn_experts: int | None = None
    host_counts: tuple[int, ...] | None = None

    @property
    def num_experts(self) -> int:
        return self.counts_E.shape[0]

    @property
    def ffn_counts_e(self) -> Tensor:
        """``counts_E`` of the experts that have a feed-forward network."""
        return self.counts_E[: self.num_ffn_experts]

    def counts_on_host(self) -> list[int]:
        """``counts_E`` as host integers: one host synchronisation, unless the router made it already."""
        counts: list[int] = self.counts_E.tolist() if self.host_counts is None else list(self.host_counts)
        return counts

    def expert_ids_N(self) -> Tensor:
        """The expert of each assignment, int64, non-decreasing."""
        experts_E = torch.arange(self.num_experts, device=self.counts_E.device)
        return torch.repeat_interleave(experts_E, self.counts_E, output_size=self.token_ids_N.shape[0])

    def select(
        self, index_n: Tensor | slice, counts_E: Tensor, host_counts: tuple[int, ...] | None = None
    ) -> Assignment:
        """Some of the assignments, still sorted; ``counts_E`` (and its host copy) are theirs."""

        def chosen(values_N: Tensor) -> Tensor:
            return values_N[index_n] if isinstance(index_n, slice) else values_N.gather(0, index_n)

        scale_N, choice_N = self.forward_scale_N, self.choice_N
        return replace(
            self,
            token_ids_N=chosen(self.token_ids_N),
            weights_N=chosen(self.weights_N),
            counts_E=counts_E,
            forward_scale_N=None if scale_N is None else chosen(scale_N),
            choice_N=None if choice_N is None else chosen(choice_N),
            host_counts=host_counts,
        )

    def to_ffn(self, size: int) -> Assignment:
        """The first ``size`` assignments, which are those to experts with a feed-forward network."""
        host_counts = None if self.host_counts is None else self.host_counts[: self.num_ffn_experts]
        return replace(self.select(slice(size), self.ffn_counts_e, host_counts), num_ffn_experts=None)

    def detach(self) -> Assignment:
        """The same without an autograd graph."""
        return replace(
            self, **{name: t.detach() for name in _TENSORS if (t := getattr(self, name)) is not None}
        )


_HOST = ("num_ffn_experts", "host_counts")
_TENSORS = tuple(f.name for f in fields(Assignment) if f.name not in _HOST)


def _flatten(a: Assignment) -> tuple[list[Any], tuple[Any, ...]]:
    return [getattr(a, name) for name in _TENSORS], tuple(getattr(a, name) for name in _HOST)


def _unflatten(values: Any, context: tuple[Any, ...]) -> Assignment:
    return Assignment(**dict(zip((*_TENSORS, *_HOST), (*values, *context), strict=True)))


pytree.register_pytree_node(
    Assignment, _flatten, _unflatten, serialized_type_name="moetrain.moe.assignment.Assignment"
)
