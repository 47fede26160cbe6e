"""What the tests of routers' repair share.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe import ROUTERS, RouterContext, Routing
from moetrain.moe.assign import apply_capacity, from_token_choice
from moetrain.moe.options import DropOrder, Repair
from moetrain.moe.repair import repair_overflow

RULES = ["next_expert", "local", "fill_in", "local_fill_in"]
SCORED = sorted(name for name, spec in ROUTERS.items() if spec.cls.has_scores)
LIMITS = (0.5, 0, DropOrder.position, "sequence")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def top_two(logits_TE: Tensor, ctx: RouterContext) -> Routing:
    """Two experts a token, weights that sum to 1."""
    scores_TE = logits_TE.softmax(-1)
    ids_TK = logits_TE.topk(2).indices
    weights_TK = scores_TE.gather(1, ids_TK)
    weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    return from_token_choice(ids_TK, weights_TK, ctx, logits_TE.shape[1], scores_TE, logits_TE)


def repaired(wanted: Routing, ctx: RouterContext, rule: str) -> Routing:
    kept = apply_capacity(wanted, ctx, *LIMITS)
    all_TE = torch.ones(len(ctx.positions_T), wanted.num_experts, dtype=torch.bool)
    return repair_overflow(wanted, kept, ctx, Repair[rule], *LIMITS, all_TE)


def of_devices(rule: str, devices: int = 5) -> dict[str, int]:
    """The options of a local repair over as many devices, which take a sequence each in turn."""
    return {"local_devices": devices, "local_sequences": 1} if Repair[rule].is_local else {}


def skewed(seed: int, tokens: int, num_experts: int) -> Tensor:
    return normal(seed, tokens, num_experts) - torch.arange(num_experts) / 2


def pairs_of(routing: Routing) -> set[tuple[int, int]]:
    """(token, expert)."""
    a = routing.assignment
    return set(zip(a.token_ids_N.tolist(), a.expert_ids_N().tolist(), strict=True))
