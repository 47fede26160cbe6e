"""Routing groups: the tokens that a router couples, padded to one rectangle.

Shapes: T tokens, B sequences of S, G groups, L = tokens of a group with padding, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.assign import sequences_per_group
from moetrain.moe.context import RouterContext


def by_group(values_TC: Tensor, ctx: RouterContext, group: str) -> tuple[Tensor, Tensor]:
    """(values [G, L, C], valid [G, L]): each group's tokens in order. ValueError as sequences_per_group."""
    num_groups = ctx.batch // sequences_per_group(group, ctx.batch)
    length = ctx.batch * ctx.seq // num_groups if num_groups else 0
    valid_T = ctx.valid_T
    if valid_T is None:
        valid_T = torch.ones(values_TC.shape[0], dtype=torch.bool, device=values_TC.device)
    return values_TC.view(num_groups, length, values_TC.shape[1]), valid_T.view(num_groups, length)
