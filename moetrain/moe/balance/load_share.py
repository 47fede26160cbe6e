"""Balance losses of load shares: switch, gshard_first, sum_over_k, moepp, l1, excess, p_penalty.

Shapes: T tokens, B sequences, E experts of the layer.

Every loss here is ``E / T_global * sum_t sum_e f_e(t) p_te`` over valid tokens t: p are the router's scores
normalised to sum 1, and f_e(t) is the load share of expert e that token t sees. The *name* says how load is
counted and normalised, the *scope* over which tokens. f is a count, so it has no gradient, and for a fixed f
the loss is linear in p: contributions of micro-batches and ranks add up to the loss of the whole batch.
``sequence`` and ``global_batch`` therefore do not depend on how the batch was split; ``micro`` does.

``moepp`` lacks the factor E. ``excess`` is ``1 / T_global * sum_t (E f_e(t) - 1) s_te`` with e the token's
first choice and s its score as it is.

Sources: Fedus et al. 2021 (switch, eq. 4), Lepikhin et al. 2020 (gshard_first), DeepSeek-AI 2024 (sequence
scope), Qiu et al. 2025 "Demons in the detail" (global_batch scope), Jin et al. 2024 (moepp, eq. 7), Wang et
al. 2024 (l1: ReMoE, eq. 9), Dai et al. 2022 (excess: StableMoE, and its released code), Wang et al. 2024
(p_penalty: HMoE, arXiv:2408.10681; written from the paper's equations as restated elsewhere, the code was not
read).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moetrain.moe.assign import count
from moetrain.moe.balance.base import SCOPES, Seen, probabilities, register_loss, scores
from moetrain.moe.balance.options import NoOptions
from moetrain.moe.routing import RoutingRecord

RUNNING = "running_load"  # load shares (of sum 1) that a controller gives, for the running scope


def demand_E(routing: RoutingRecord, options: NoOptions) -> Tensor:
    """Assignments wanted of each expert."""
    return routing.demand_E


def first_E(routing: RoutingRecord, options: NoOptions) -> Tensor:
    """First choices of each expert."""
    return first_choices_BE(routing).sum(0)


def first_choices_BE(routing: RoutingRecord) -> Tensor:
    """How often each expert has a valid token's highest score, int64 [B, E]."""
    batch, num_experts = routing.demand_BE.shape
    first_T = _first_T(routing)
    if routing.valid_T is not None:
        first_T = torch.where(routing.valid_T, first_T, num_experts)
    rows_T = torch.arange(batch, device=first_T.device).repeat_interleave(first_T.shape[0] // max(batch, 1))
    width = num_experts + 1
    counts = count(rows_T * width + first_T, batch * width)
    return counts.view(batch, width)[:, :num_experts]


@register_loss(
    "switch",
    scopes=SCOPES,
    ahead=demand_E,
    at_balance="1",
    what="E sum_e f_e P_e, f the share of all assignments",
)
def switch(routing: RoutingRecord, seen: Seen[NoOptions]) -> Tensor:
    return _loss(routing, seen, probabilities(routing), _share(routing, seen, _demand_BE)[0])


@register_loss(
    "gshard_first", scopes=SCOPES, ahead=first_E, at_balance="1", what="f counts first choices only"
)
def gshard_first(routing: RoutingRecord, seen: Seen[NoOptions]) -> Tensor:
    return _loss(routing, seen, probabilities(routing), _share(routing, seen, first_choices_BE)[0])


@register_loss(
    "sum_over_k", scopes=SCOPES, ahead=demand_E, at_balance="k", what="f counts assignments per token"
)
def sum_over_k(routing: RoutingRecord, seen: Seen[NoOptions]) -> Tensor:
    share, per_token = _share(routing, seen, _demand_BE)
    return _loss(routing, seen, probabilities(routing), share * per_token)


@register_loss(
    "moepp",
    scopes=SCOPES,
    ahead=demand_E,
    at_balance="k / E",
    what="MoE++'s: `sum_over_k` without the factor E",
)
def moepp(routing: RoutingRecord, seen: Seen[NoOptions]) -> Tensor:
    return sum_over_k(routing, seen) / routing.num_experts


@register_loss(
    "l1",
    scopes=SCOPES,
    ahead=demand_E,
    at_balance="k times a token's sum of scores",
    what="`sum_over_k` with the scores as they are: ReMoE's, with the controller `sparsity`",
)
def l1(routing: RoutingRecord, seen: Seen[NoOptions]) -> Tensor:
    share, per_token = _share(routing, seen, _demand_BE)
    return _loss(routing, seen, scores(routing), share * per_token)


@register_loss(
    "excess",
    scopes=SCOPES,
    ahead=first_E,
    at_balance="0",
    what="StableMoE's: the score of a token's first choice times E f - 1, with f of first choices",
)
def excess(routing: RoutingRecord, seen: Seen[NoOptions]) -> Tensor:
    batch, num_experts = routing.demand_BE.shape
    s_TE = scores(routing)
    chosen_TE = torch.zeros_like(s_TE).scatter(-1, _first_T(routing)[:, None], 1.0)
    s_BE = (s_TE * chosen_TE).reshape(batch, s_TE.shape[0] // max(batch, 1), num_experts).sum(1)
    over_BE = num_experts * _share(routing, seen, first_choices_BE)[0] - 1
    return (over_BE.to(s_BE.dtype) * s_BE).sum() / seen.num_tokens


def _first_T(routing: RoutingRecord) -> Tensor:
    return probabilities(routing).detach().argmax(-1)


@register_loss(
    "p_penalty",
    scopes=SCOPES,
    ahead=demand_E,
    at_balance="k",
    what="HMoE's: `sum_over_k`, an expert's term times its width over the mean width",
)
def p_penalty(routing: RoutingRecord, seen: Seen[NoOptions]) -> Tensor:
    """The paper's penalty of activated parameters, over the mean width: its coefficient goes by that."""
    share, per_token = _share(routing, seen, _demand_BE)
    p_TE, width_E = probabilities(routing), routing.width_E
    if width_E is not None:
        width_E = width_E.to(share.dtype)
        networks = (width_E > 0).sum()  # the mean is over experts that have a network
        share = share * (width_E * networks / width_E.sum())
    return _loss(routing, seen, p_TE, share * per_token)


def _demand_BE(routing: RoutingRecord) -> Tensor:
    return routing.demand_BE


def _loss(routing: RoutingRecord, seen: Seen[NoOptions], p_TE: Tensor, share: Tensor) -> Tensor:
    batch, num_experts = routing.demand_BE.shape
    share_BE = share.to(p_TE.dtype)
    p_BE = p_TE.reshape(batch, p_TE.shape[0] // max(batch, 1), num_experts).sum(1)
    if routing.price_E is not None:
        p_BE = p_BE * routing.price_E.to(p_BE.dtype)
    return (share_BE * p_BE).sum() * (num_experts / seen.num_tokens)


def _share(
    routing: RoutingRecord, seen: Seen[NoOptions], load_BE: Callable[[RoutingRecord], Tensor]
) -> tuple[Tensor, Tensor]:
    """f, float64, [B, E] or [1, E], the load share that each sequence's tokens see; assignments per token."""
    if seen.scope == "running":
        if RUNNING not in seen.signals:
            raise ValueError(f"the running scope needs {RUNNING}, which no controller gives for this layer")
        share = seen.signals[RUNNING][None].to(routing.demand_BE.device, torch.float64)
        return share, routing.demand_E.sum() / routing.num_tokens.clamp(min=1)
    if seen.scope == "global_batch":
        load = seen.counted()[None].to(routing.demand_BE.device, torch.float64)
        tokens = load.new_full((), seen.num_tokens)
    else:
        load, tokens = load_BE(routing).double(), routing.num_tokens_B[:, None].double()
        if seen.scope == "micro":
            load, tokens = load.sum(0, keepdim=True), tokens.sum()
    return load / load.sum(-1, keepdim=True).clamp(min=1), load.sum(-1, keepdim=True) / tokens.clamp(min=1)
