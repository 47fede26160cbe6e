"""Building a Routing: sorting token choices by expert, and capacity as a transform of a Routing.

Shapes: T tokens, K choices a token, E experts, N assignments, B sequences, G routing groups.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moetrain.moe.assignment import Assignment
from moetrain.moe.context import RouterContext
from moetrain.moe.options import DropOrder
from moetrain.moe.routing import Routing

_DROP_SALT = 0x5EED
ALL = "all"  # the routing group of all ranks' tokens


def from_token_choice(
    ids_TK: Tensor,
    weights_TK: Tensor,
    ctx: RouterContext,
    num_experts: int,
    scores_TE: Tensor | None = None,
    logits_TE: Tensor | None = None,
    ragged: bool = False,
) -> Routing:
    """A Routing of each valid token's distinct experts, K at most; differentiable in ``weights_TK``.

    An id equal to ``num_experts`` stands for no expert; ``ragged`` must be set if there may be such ids.
    """
    num_choices = ids_TK.shape[1]
    ids_M = ids_TK.reshape(-1)
    if ctx.valid_T is not None:  # padding goes to a bin of its own, cut off below
        ids_M = torch.where(ctx.valid_T.repeat_interleave(num_choices), ids_M, num_experts)
    order_N = stable_order(ids_M, num_experts + 1)
    counts_E = count(ids_M, num_experts + 1)[:num_experts]
    host_counts = None
    if ctx.valid_T is not None or ragged:
        host_counts = tuple(counts_E.tolist())
        order_N = order_N[: sum(host_counts)]
    assignment = Assignment(
        token_ids_N=order_N // num_choices,
        weights_N=weights_TK.reshape(-1).gather(0, order_N),
        counts_E=counts_E,
        choice_N=order_N % num_choices,
        host_counts=host_counts,
    )
    return Routing(
        assignment=assignment,
        num_tokens_B=tokens_per_sequence(ctx),
        demand_BE=count_BE(ids_TK, ctx, num_experts),
        scores_TE=scores_TE,
        logits_TE=logits_TE,
        valid_T=ctx.valid_T,
    )


def from_mask(
    mask_TE: Tensor,
    weights_TE: Tensor,
    ctx: RouterContext,
    scores_TE: Tensor | None = None,
    logits_TE: Tensor | None = None,
) -> Routing:
    """A Routing of the pairs of a valid token and an expert that ``mask_TE`` marks; any number of pairs."""
    if ctx.valid_T is not None:
        mask_TE = mask_TE & ctx.valid_T[:, None]
    counts_E, num_experts = mask_TE.sum(0), mask_TE.shape[1]
    host_counts = tuple(counts_E.tolist())
    pairs_2N = _places(mask_TE.t(), sum(host_counts)).t()  # sorted by (expert, token)
    assignment = Assignment(
        token_ids_N=pairs_2N[1],
        weights_N=weights_TE[pairs_2N[1], pairs_2N[0]],
        counts_E=counts_E,
        host_counts=host_counts,
    )
    return Routing(
        assignment=assignment,
        num_tokens_B=tokens_per_sequence(ctx),
        demand_BE=mask_TE.view(ctx.batch, ctx.seq, num_experts).sum(1),
        scores_TE=scores_TE,
        logits_TE=logits_TE,
        valid_T=ctx.valid_T,
    )


def stable_order(keys: Tensor, num_keys: int) -> Tensor:
    """The stable argsort of small non-negative integers; several times faster where they fit 16 bits."""
    small = keys.to(torch.int16) if num_keys < 2**15 else keys
    return torch.sort(small, stable=True).indices


def count(keys_M: Tensor, num_keys: int) -> Tensor:
    """How often each of 0 to ``num_keys`` - 1 occurs among int64 keys, int64 [num_keys].

    torch.bincount waits for a device twice, for its keys' least and largest.
    """
    return keys_M.new_zeros(num_keys).scatter_add_(0, keys_M, torch.ones_like(keys_M))


def _places(mask: Tensor, size: int) -> Tensor:
    """``mask.nonzero()``, which has ``size`` rows; on an accelerator without waiting for their number."""
    return mask.nonzero() if mask.device.type == "cpu" else torch.nonzero_static(mask, size=size)


def tokens_per_sequence(ctx: RouterContext) -> Tensor:
    """Valid tokens of each sequence, int64 [B]."""
    if ctx.valid_T is None:
        return torch.full((ctx.batch,), ctx.seq, device=ctx.sample_ids_B.device)
    return ctx.valid_T.view(ctx.batch, ctx.seq).sum(1)


def count_BE(ids_TK: Tensor, ctx: RouterContext, num_experts: int) -> Tensor:
    """How often each sequence's valid tokens chose each expert, int64 [B, E]."""
    width = num_experts + 1
    if ctx.valid_T is not None:
        ids_TK = torch.where(ctx.valid_T[:, None], ids_TK, num_experts)
    rows_T1 = ctx.sequence_ids_T[:, None] * width
    counts = count((rows_T1 + ids_TK).reshape(-1), ctx.batch * width)
    return counts.view(ctx.batch, width)[:, :num_experts]


def sequences_per_group(group: str, batch: int) -> int:
    """The number of sequences in a routing group. Raises ValueError if it does not divide ``batch``."""
    if group == ALL:
        return max(batch, 1)
    if group != "sequence" and not (group.isdecimal() and int(group)):
        raise ValueError(
            f"router.group={group!r} must be 'sequence', a positive number of sequences, or 'all'"
        )
    size = 1 if group == "sequence" else int(group)
    if batch % size:
        raise ValueError(f"router.group={group} does not divide a batch of {batch} sequences")
    return size


def apply_capacity(
    routing: Routing,
    ctx: RouterContext,
    factor: float,
    minimum: int,
    order: DropOrder,
    group: str,
    *,
    of_tokens: bool = False,
) -> Routing:
    """Keep at most C = max(minimum, ceil(factor * demand / E)) assignments per routing group and expert.

    For a top-k router demand / E is T K / E, so C is GShard's and Switch's capacity. ``of_tokens``: the
    group's valid tokens take the place of the demand. Where experts have prices, C is proportional to their
    inverse instead of to 1 / E (MoE++, eq. 8). Dropped assignments are removed; ``demand_BE`` still counts
    them.
    """
    capacity_EG = group_capacity(routing, ctx, factor, minimum, group, of_tokens)
    num_experts, num_groups = capacity_EG.shape
    experts_N = routing.assignment.expert_ids_N()
    keys_N = experts_N * num_groups + group_ids(routing.assignment.token_ids_N, ctx, num_groups)
    rank_N = rank_within(keys_N, drop_priority(routing, ctx, experts_N, order), num_groups * num_experts)
    is_kept_N = rank_N < capacity_EG.view(-1)[keys_N]
    counts_E = count(experts_N.where(is_kept_N, num_experts), num_experts + 1)[:num_experts]
    host_counts = tuple(counts_E.tolist())
    kept_N = _places(is_kept_N, sum(host_counts)).squeeze(1)
    return replace(routing, assignment=routing.assignment.select(kept_N, counts_E, host_counts))


def group_capacity(
    routing: Routing, ctx: RouterContext, factor: float, minimum: int, group: str, of_tokens: bool = False
) -> Tensor:
    """C of each expert and routing group, int64 [E, G]; the arguments are :func:`apply_capacity`'s."""
    size = sequences_per_group(group, ctx.batch)
    counted_B = routing.num_tokens_B if of_tokens else routing.demand_BE.sum(1)
    counted_G = counted_B.view(ctx.batch // size, size).sum(1)
    share_E = torch.ones_like(routing.demand_E) if routing.price_E is None else 1 / routing.price_E
    share_E = share_E.double() / share_E.double().sum()
    capacity_EG = factor * share_E[:, None] * counted_G.double()
    # a factor may be as large as a float gets, and no group has 2^62 assignments
    return (capacity_EG - 1e-9).ceil().clamp(max=2.0**62).long().clamp(min=minimum)


def group_ids(token_ids: Tensor, ctx: RouterContext, num_groups: int) -> Tensor:
    """The routing group of each token, int64."""
    return token_ids // max(ctx.batch * ctx.seq // max(num_groups, 1), 1)


def drop_priority(routing: Routing, ctx: RouterContext, experts_N: Tensor, order: DropOrder) -> Tensor | None:
    """The priority of each assignment; the highest are kept. None: by position, as they are sorted."""
    if order is DropOrder.choice:
        choice_N = routing.assignment.choice_N
        return None if choice_N is None else -choice_N
    if order is DropOrder.batch_prioritized:
        if routing.scores_TE is None:
            raise ValueError("router.drop_order=batch_prioritized needs a router with scores")
        best_T = routing.scores_TE.detach().amax(-1)
        return best_T[routing.assignment.token_ids_N]
    if order is DropOrder.probability:
        return routing.assignment.weights_N.detach()
    if order is DropOrder.random:
        noise_TE = ctx.uniform((ctx.batch * ctx.seq, routing.num_experts), _DROP_SALT)
        return noise_TE[routing.assignment.token_ids_N, experts_N]
    return None


def rank_within(keys_N: Tensor, priority_N: Tensor | None, num_keys: int) -> Tensor:
    """The rank of each assignment among those with its key, by falling priority, ties by position."""
    starts = count(keys_N, num_keys).cumsum(0)
    starts = torch.cat([starts.new_zeros(1), starts[:-1]])
    places_N = torch.arange(keys_N.shape[0], device=keys_N.device)
    if priority_N is None:
        return places_N - starts[keys_N]
    by_priority = torch.argsort(priority_N, descending=True, stable=True)
    order = by_priority[torch.argsort(keys_N[by_priority], stable=True)]
    rank_N = torch.empty_like(keys_N)
    rank_N[order] = places_N - starts[keys_N[order]]
    return rank_N
