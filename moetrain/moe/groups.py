"""Routing groups: the tokens that a router couples, padded to one rectangle.

Shapes: T tokens of this rank, B sequences of S, G groups, L = tokens of a group with padding, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.assign import ALL, sequences_per_group
from moetrain.moe.context import RouterContext


@dataclass(frozen=True)
class Groups:
    """Each group's tokens in order; ``valid_GL`` is False on padding."""

    values_GLC: Tensor
    valid_GL: Tensor
    first: int  # this rank's first token among all G L
    tokens: int  # T

    def own(self, found_GL: Tensor) -> Tensor:
        """This rank's part [T, ...] of a result [G, L, ...] for all tokens of the groups."""
        return found_GL.flatten(0, 1)[self.first : self.first + self.tokens]


def by_group(values_TC: Tensor, ctx: RouterContext, group: str) -> Groups:
    """``values_TC`` (without gradient) by routing group. Raises ValueError as sequences_per_group does.

    The group ``all`` has the tokens of every rank of ``ctx.group``, in rank order, which must hold equally
    many: one all-gather, after which every rank solves the same problem.
    """
    tokens = values_TC.shape[0]
    valid_T = ctx.valid_T
    if valid_T is None:
        valid_T = torch.ones(tokens, dtype=torch.bool, device=values_TC.device)
    if group == ALL and ctx.group is not None:
        values_TC, valid_T = _gather(values_TC, ctx.group), _gather(valid_T, ctx.group)
        whole = values_TC[None], valid_T[None]
        return Groups(*whole, dist.get_rank(ctx.group) * tokens, tokens)
    num_groups = ctx.batch // sequences_per_group(group, ctx.batch)
    length = tokens // num_groups if num_groups else 0
    values_GLC = values_TC.view(num_groups, length, values_TC.shape[1])
    return Groups(values_GLC, valid_T.view(num_groups, length), 0, tokens)


def _gather(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(rows.shape[0] * group.size(), *rows.shape[1:])
    dist.all_gather_into_tensor(out, rows.contiguous(), group=group)
    return out
