"""What a router may ask of all experts before it routes, and hear of those that it chose.

An answer comes back through the same dispatch and combine as results do: each row becomes a row of as many
numbers as there are experts, zero but for its own expert's, and their sum at the token is all answers. So it
works under every dispatcher, and is differentiable to the experts and their input.

Shapes: T tokens, D model, R computed rows, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.moe.assign import from_mask
from moetrain.moe.assignment import Assignment
from moetrain.moe.context import RouterContext
from moetrain.moe.routing import Routing


@dataclass(frozen=True)
class Question:
    """``response``: outputs of experts, [R, D], at least fp32, -> one number a row, [R].

    ``directions``: whether the router wants :meth:`Asking.judged` called. ``rows_per_token``: all experts of
    as many tokens are computed at once as make that many rows for each token of the batch; nothing of them is
    kept but their input.
    """

    response: Callable[[Tensor], Tensor]
    rows_per_token: int
    directions: bool = False


class Asking:
    """What a router may override to choose by experts' outputs; by default it asks nothing."""

    reads_outputs = False  # whether ``asks`` ever asks

    def asks(self, ctx: RouterContext) -> Question | None:
        """What it wants to know of every expert's output for every token of this pass, before it routes.

        The layer answers by ``ctx.responses_TE``. A function of mode, seed, step and layer alone, so that all
        ranks agree.
        """
        return None

    def judged(
        self, routing: Routing, directions_TD: Tensor, present_T: Tensor, ctx: RouterContext
    ) -> Routing:
        """The Routing, given the chosen experts' outputs; called where its question says ``directions``.

        ``directions_TD``: the sum of a token's outputs, each of length 1; ``present_T``: how many of them are
        not zero.
        """
        return routing


# (an expert's output rows [R, D], the number of each row's expert [R]) -> what is sent back in their place
Read = Callable[[Tensor, Tensor], Tensor]


def answers(response: Callable[[Tensor], Tensor], num_experts: int) -> Read:
    """A reader whose sum over a token's rows is [T, E]: each expert's answer, 0 where it was not asked."""

    def read(out_RD: Tensor, expert_R: Tensor) -> Tensor:
        answer_R = response(out_RD.to(torch.promote_types(out_RD.dtype, torch.float32)))
        place_RE = F.one_hot(expert_R, num_experts)
        return answer_R[:, None] * place_RE.to(answer_R.dtype)

    return read


def with_directions(out_RD: Tensor, expert_R: Tensor) -> Tensor:
    """[R, 2 D + 1]: the row, its direction (zeros where it has none), and 1 where it has one."""
    wide_RD = out_RD.to(torch.promote_types(out_RD.dtype, torch.float32))
    unit_RD = F.normalize(wide_RD, dim=-1)
    present_R1 = (out_RD.detach() != 0).any(-1, keepdim=True)
    return torch.cat([out_RD, unit_RD.to(out_RD.dtype), present_R1.to(out_RD.dtype)], 1)


def every_pair(ctx: RouterContext, num_experts: int, dtype: torch.dtype) -> Assignment:
    """Every valid token to every expert, each with weight 1."""
    tokens, device = ctx.batch * ctx.seq, ctx.sample_ids_B.device
    mask_TE = torch.ones(tokens, num_experts, dtype=torch.bool, device=device)
    return from_mask(mask_TE, mask_TE.to(dtype), ctx).assignment
