"""Load-balance losses as pure functions of Routings, each a sum that any split of the batch adds up to.

Shapes: T tokens, B sequences, E experts, L MoE layers.

Every balance loss here is ``E / T_global * sum_t sum_e f_e(t) p_te`` over valid tokens t: p are the router's
scores normalised to sum 1, and f_e(t) is the load share of expert e that token t sees. The *form* says how
load is counted and normalised, the *scope* over which tokens. f is a count, so it has no gradient, and for a
fixed f the loss is linear in p: contributions of micro-batches and ranks add up to the loss of the whole
batch. ``sequence`` and ``global_batch`` therefore do not depend on how the batch was split; ``micro`` does.

Each layer's loss is added with the full coefficient (Switch, Megatron-Core), not averaged over layers.
Sources: Fedus et al. 2021 (switch, eq. 4), Lepikhin et al. 2020 (gshard_first), Zoph et al. 2022 (z, eq. 5),
DeepSeek-AI 2024 (sequence scope), Qiu et al. 2025 "Demons in the detail" (global_batch scope).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from moetrain.moe.routing import Routing

FORMS = ("switch", "gshard_first", "sum_over_k")
SCOPES = ("micro", "sequence", "global_batch", "running")


@dataclass(frozen=True)
class StepTotals:
    """Figures of the whole optimizer step that a micro-batch's losses need.

    num_tokens   valid tokens of the global batch (all ranks, all micro-batches).
    demand_LE    assignments wanted, of the global batch; None where no loss is ``global_batch``.
    first_LE     first choices, likewise, for ``gshard_first``.
    running_LE   load shares (rows sum to 1) for the ``running`` scope.
    """

    num_tokens: float
    demand_LE: Tensor | None = None
    first_LE: Tensor | None = None
    running_LE: Tensor | None = None


def probabilities(routing: Routing) -> Tensor:
    """p [T, E]: the scores, normalised to sum 1 a token (sigmoid scores need it), zero where padded."""
    scores_TE = routing.scores_TE
    if scores_TE is None:
        raise ValueError("this router returns no scores, so it has no balance loss: use balance=none")
    p_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
    return p_TE if routing.valid_T is None else p_TE * routing.valid_T[:, None]


def first_choices_BE(routing: Routing) -> Tensor:
    """How often each expert has a valid token's highest score, int64 [B, E]."""
    p_TE = probabilities(routing).detach()
    batch, num_experts = routing.demand_BE.shape
    first_T = p_TE.argmax(-1)
    if routing.valid_T is not None:
        first_T = torch.where(routing.valid_T, first_T, num_experts)
    rows_T = torch.arange(batch, device=first_T.device).repeat_interleave(first_T.shape[0] // max(batch, 1))
    width = num_experts + 1
    counts = torch.bincount(rows_T * width + first_T, minlength=batch * width)
    return counts.view(batch, width)[:, :num_experts]


def balance_loss(routing: Routing, form: str, scope: str, totals: StepTotals, layer: int = 0) -> Tensor:
    """This micro-batch's contribution to the balance loss of one layer, a scalar without coefficient.

    ``layer`` is the row of the totals' matrices. The sum over micro-batches and ranks is 1 (``switch``,
    ``gshard_first``) or k (``sum_over_k``) at perfect balance. Raises ValueError for an unknown form or
    scope, or where the totals lack what the scope needs.
    """
    if form not in FORMS or scope not in SCOPES:
        raise ValueError(f"form={form!r} (known: {FORMS}), scope={scope!r} (known: {SCOPES})")
    p_TE = probabilities(routing)
    batch, num_experts = routing.demand_BE.shape
    share_BE = _share(routing, form, scope, totals, layer).to(p_TE.dtype)
    p_BE = p_TE.reshape(batch, p_TE.shape[0] // max(batch, 1), num_experts).sum(1)
    return (share_BE * p_BE).sum() * (num_experts / totals.num_tokens)


def _share(routing: Routing, form: str, scope: str, totals: StepTotals, layer: int) -> Tensor:
    """f, float64, [B, E] or [1, E]: the load share that each sequence's tokens see."""
    first = form == "gshard_first"
    if scope == "running":
        if totals.running_LE is None:
            raise ValueError("the running scope needs totals.running_LE")
        share = totals.running_LE[layer : layer + 1].to(routing.demand_BE.device, torch.float64)
        per_token = routing.demand_E.sum() / routing.num_tokens.clamp(min=1)
    else:
        if scope == "global_batch":
            counts_LE = totals.first_LE if first else totals.demand_LE
            if counts_LE is None:
                raise ValueError("the global_batch scope needs the step's counts in totals")
            load = counts_LE[layer : layer + 1].to(routing.demand_BE.device, torch.float64)
            tokens = load.new_tensor(totals.num_tokens)
        else:
            load = (first_choices_BE(routing) if first else routing.demand_BE).double()
            tokens = routing.num_tokens_B[:, None].double()
            if scope == "micro":
                load, tokens = load.sum(0, keepdim=True), tokens.sum()
        share = load / load.sum(-1, keepdim=True).clamp(min=1)
        per_token = load.sum(-1, keepdim=True) / tokens.clamp(min=1)
    return share * per_token if form == "sum_over_k" else share


def z_loss(routing: Routing, totals: StepTotals) -> Tensor:
    """This micro-batch's contribution to mean_t (logsumexp_e z_te)^2, a scalar without coefficient."""
    if routing.logits_TE is None:
        raise ValueError("this router returns no logits, so it has no z-loss")
    square_T = torch.logsumexp(routing.logits_TE, dim=-1).square()
    if routing.valid_T is not None:
        square_T = torch.where(routing.valid_T, square_T, 0)
    return square_T.sum() / totals.num_tokens


@dataclass(frozen=True)
class LossTerm:
    """One configured loss: its name (a form, or ``z``), coefficient and scope."""

    name: str
    coef: float
    scope: str

    @property
    def key(self) -> str:
        """What metrics call it."""
        return self.name if self.name == "z" else f"{self.name}_{self.scope}"


def make_terms(losses: Sequence[object]) -> list[LossTerm]:
    """Terms of a config's list of losses (enum or string fields ``name`` and ``scope``, float ``coef``)."""

    def text(value: object) -> str:
        return value.value if isinstance(value, Enum) else str(value)

    terms = [LossTerm(text(x.name), float(x.coef), text(x.scope)) for x in losses]  # type: ignore[attr-defined]
    if len({t.key for t in terms}) < len(terms):
        raise ValueError(f"balance.losses names a loss twice: {', '.join(t.key for t in terms)}")
    return terms


def total_loss(
    routings: Sequence[Routing], terms: Sequence[LossTerm], totals: StepTotals
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(coefficient-weighted sum over layers and terms, raw values per term [L], detached for logging)."""
    total: Tensor | None = None
    raw: dict[str, Tensor] = {}
    for term in terms:
        values = [
            z_loss(r, totals) if term.name == "z" else balance_loss(r, term.name, term.scope, totals, layer)
            for layer, r in enumerate(routings)
        ]
        if not values:
            continue
        raw[term.key] = torch.stack([v.detach() for v in values])
        weighted = term.coef * torch.stack(values).sum()
        total = weighted if total is None else total + weighted
    return total, raw
