"""Load-balance losses as pure functions of Routings, each a sum that any split of the batch adds up to.

Shapes: T tokens, B sequences, E experts, L MoE layers.

Every balance loss here is ``E / T_global * sum_t sum_e f_e(t) p_te`` over valid tokens t: p are the router's
scores normalised to sum 1, and f_e(t) is the load share of expert e that token t sees. The *form* says how
load is counted and normalised, the *scope* over which tokens. f is a count, so it has no gradient, and for a
fixed f the loss is linear in p: contributions of micro-batches and ranks add up to the loss of the whole
batch. ``sequence`` and ``global_batch`` therefore do not depend on how the batch was split; ``micro`` does.

Each layer's loss is added with the full coefficient (Switch, Megatron-Core), not averaged over layers.
Sources: Fedus et al. 2021 (switch, eq. 4), Lepikhin et al. 2020 (gshard_first), Zoph et al. 2022 (z, eq. 5),
DeepSeek-AI 2024 (sequence scope), Qiu et al. 2025 "Demons in the detail" (global_batch scope), Wang et al.
2024 (l1: ReMoE, eq. 9).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from moetrain.moe.assign import count
from moetrain.moe.balance.moments import MOMENTS, moment_loss
from moetrain.moe.balance.shaping import OPTIONS, chunk_sparsity_loss, dirichlet_loss, locality_loss
from moetrain.moe.routing import Routing

FORMS = ("switch", "gshard_first", "sum_over_k", "l1")
SCOPES = ("micro", "sequence", "global_batch", "running")
UNSCOPED = ("z", "penalty", "locality", "chunk_sparsity")  # alike at every scope

ByLayer = Mapping[int, Tensor]


@dataclass(frozen=True)
class StepTotals:
    """Figures of the whole optimizer step that a micro-batch's losses need.

    num_tokens   valid tokens of the global batch (all ranks, all micro-batches).
    demand       assignments wanted, of the global batch; None where no loss is ``global_batch``.
    first        first choices, likewise, for ``gshard_first``.
    running      load shares (of sum 1) for the ``running`` scope.
    moments      name -> sums of ``moment_BE`` over the global batch, for the losses of ``moments.py``.
    factors      name -> what controllers multiply that loss's coefficient with, a layer.
    step         the optimizer step, from 0, for coefficients that change.

    Each of the first four has one tensor [E] a layer, by its place in the decoder.
    """

    num_tokens: float
    demand: ByLayer | None = None
    first: ByLayer | None = None
    running: ByLayer | None = None
    moments: Mapping[str, ByLayer] = field(default_factory=dict)
    factors: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    step: int = 0


def probabilities(routing: Routing) -> Tensor:
    """p [T, E]: the scores, normalised to sum 1 a token (sigmoid scores need it), zero where padded."""
    scores_TE = _scores(routing)
    return scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)


def _scores(routing: Routing) -> Tensor:
    """The scores, zero where padded."""
    scores_TE = routing.scores_TE
    if scores_TE is None:
        raise ValueError("this router returns no scores, so it has no balance loss: use balance=none")
    return scores_TE if routing.valid_T is None else scores_TE * routing.valid_T[:, None]


def first_choices_BE(routing: Routing) -> Tensor:
    """How often each expert has a valid token's highest score, int64 [B, E]."""
    p_TE = probabilities(routing).detach()
    batch, num_experts = routing.demand_BE.shape
    first_T = p_TE.argmax(-1)
    if routing.valid_T is not None:
        first_T = torch.where(routing.valid_T, first_T, num_experts)
    rows_T = torch.arange(batch, device=first_T.device).repeat_interleave(first_T.shape[0] // max(batch, 1))
    width = num_experts + 1
    counts = count(rows_T * width + first_T, batch * width)
    return counts.view(batch, width)[:, :num_experts]


def balance_loss(routing: Routing, form: str, scope: str, totals: StepTotals, layer: int = 0) -> Tensor:
    """This micro-batch's contribution to the balance loss of one layer, a scalar without coefficient.

    ``layer`` is the place of the totals' tensors. The sum over micro-batches and ranks is 1 (``switch``,
    ``gshard_first``), k (``sum_over_k``) or k times the mean sum of a token's scores (``l1``) at perfect
    balance. Raises ValueError for an unknown form or
    scope, or where the totals lack what the scope needs.
    """
    if form not in FORMS or scope not in SCOPES:
        raise ValueError(f"form={form!r} (known: {FORMS}), scope={scope!r} (known: {SCOPES})")
    p_TE = _scores(routing) if form == "l1" else probabilities(routing)
    batch, num_experts = routing.demand_BE.shape
    share_BE = _share(routing, form, scope, totals, layer).to(p_TE.dtype)
    p_BE = p_TE.reshape(batch, p_TE.shape[0] // max(batch, 1), num_experts).sum(1)
    if routing.price_E is not None:
        p_BE = p_BE * routing.price_E.to(p_BE.dtype)
    return (share_BE * p_BE).sum() * (num_experts / totals.num_tokens)


def _share(routing: Routing, form: str, scope: str, totals: StepTotals, layer: int) -> Tensor:
    """f, float64, [B, E] or [1, E]: the load share that each sequence's tokens see."""
    first = form == "gshard_first"
    if scope == "running":
        if totals.running is None:
            raise ValueError("the running scope needs totals.running")
        share = totals.running[layer][None].to(routing.demand_BE.device, torch.float64)
        per_token = routing.demand_E.sum() / routing.num_tokens.clamp(min=1)
    else:
        if scope == "global_batch":
            counts = totals.first if first else totals.demand
            if counts is None:
                raise ValueError("the global_batch scope needs the step's counts in totals")
            load = counts[layer][None].to(routing.demand_BE.device, torch.float64)
            tokens = load.new_full((), totals.num_tokens)
        else:
            load = (first_choices_BE(routing) if first else routing.demand_BE).double()
            tokens = routing.num_tokens_B[:, None].double()
            if scope == "micro":
                load, tokens = load.sum(0, keepdim=True), tokens.sum()
        share = load / load.sum(-1, keepdim=True).clamp(min=1)
        per_token = load.sum(-1, keepdim=True) / tokens.clamp(min=1)
    return share * per_token if form in ("sum_over_k", "l1") else share


def z_loss(routing: Routing, totals: StepTotals) -> Tensor:
    """This micro-batch's contribution to mean_t (logsumexp_e z_te)^2, a scalar without coefficient."""
    if routing.logits_TE is None:
        raise ValueError("this router returns no logits, so it has no z-loss")
    square_T = torch.logsumexp(routing.logits_TE, dim=-1).square()
    if routing.valid_T is not None:
        square_T = torch.where(routing.valid_T, square_T, 0)
    return square_T.sum() / totals.num_tokens


def penalty_loss(routing: Routing, totals: StepTotals) -> Tensor:
    """This micro-batch's share, by tokens, of what the router charges for its own parameters; a scalar."""
    if routing.penalty is None:
        raise ValueError("this router has no penalty of its own: leave the loss penalty out")
    return routing.penalty * (routing.num_tokens.to(routing.penalty.dtype) / totals.num_tokens)


@dataclass(frozen=True)
class LossTerm:
    """One configured loss: its name (a form, a moment, ``z``, ``penalty``, one of ``shaping.py``), its
    coefficient and scope.

    With ``final_coef`` the coefficient goes linearly to it until step ``final_step``. The last three fields
    are options of ``shaping.py``'s losses, one each.
    """

    name: str
    coef: float
    scope: str
    final_coef: float | None = None
    final_step: int = 0
    steepness: float = 100.0
    chunk_length: int = 64
    alpha: float = 1.0

    def coef_at(self, step: int) -> float:
        if self.final_coef is None:
            return self.coef
        share = min(step / self.final_step, 1.0) if self.final_step else 1.0
        return self.coef + share * (self.final_coef - self.coef)

    def value(self, routing: Routing, totals: StepTotals, layer: int) -> Tensor:
        """This micro-batch's contribution in layer ``layer``, a scalar without coefficient."""
        if self.name == "z":
            return z_loss(routing, totals)
        if self.name == "penalty":
            return penalty_loss(routing, totals)
        if self.name == "locality":
            return locality_loss(routing, self.steepness, totals.num_tokens)
        if self.name == "chunk_sparsity":
            return chunk_sparsity_loss(routing, probabilities(routing), self.chunk_length, totals.num_tokens)
        if self.name == "dirichlet":
            p_TE = probabilities(routing)
            return dirichlet_loss(routing, p_TE, self.scope, self.alpha, totals.num_tokens)
        if self.name in MOMENTS:
            moments = totals.moments.get(self.name)
            moment_E = None if moments is None else moments[layer]
            p_TE = probabilities(routing)
            return moment_loss(routing, self.name, self.scope, p_TE, totals.num_tokens, moment_E)
        return balance_loss(routing, self.name, self.scope, totals, layer)

    @property
    def key(self) -> str:
        """What metrics call it."""
        return self.name if self.name in UNSCOPED else f"{self.name}_{self.scope}"

    @property
    def counts_ahead(self) -> bool:
        """Whether the loss needs the whole step's counts before the first backward pass."""
        return self.scope == "global_batch" and self.name not in UNSCOPED


class LossOptions(Protocol):
    """What a config says of one loss; ``name`` and ``scope`` are strings or enums of strings.

    An option that is None has the default of :class:`LossTerm`.
    """

    @property
    def name(self) -> Any: ...
    @property
    def scope(self) -> Any: ...
    @property
    def coef(self) -> float: ...
    @property
    def final_coef(self) -> float | None: ...
    @property
    def final_step(self) -> int: ...
    @property
    def steepness(self) -> float | None: ...
    @property
    def chunk_length(self) -> int | None: ...
    @property
    def alpha(self) -> float | None: ...


def make_terms(losses: Sequence[LossOptions]) -> list[LossTerm]:
    """The terms of a config's list of losses. ValueError where one is named twice."""

    def text(value: Any) -> str:
        return value.value if isinstance(value, Enum) else str(value)

    def term(x: LossOptions) -> LossTerm:
        given = {name: value for name in OPTIONS.values() if (value := getattr(x, name)) is not None}
        return LossTerm(text(x.name), float(x.coef), text(x.scope), x.final_coef, x.final_step, **given)

    terms = [term(x) for x in losses]
    if len({t.key for t in terms}) < len(terms):
        raise ValueError(f"balance.losses names a loss twice: {', '.join(t.key for t in terms)}")
    return terms


def total_loss(
    records: Mapping[int, Routing], terms: Sequence[LossTerm], totals: StepTotals
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(coefficient-weighted sum over layers and terms, raw values per term [L], detached for logging).

    ``records``: a layer's place in the decoder -> its Routing; L are the layers in this order. Raises
    ValueError that names the layer where a record lacks what a loss needs.
    """
    total: Tensor | None = None
    raw: dict[str, Tensor] = {}
    if not records:
        return None, {}
    for term in terms:
        values_L = torch.stack([_value(term, routing, totals, layer) for layer, routing in records.items()])
        raw[term.key] = values_L.detach()
        factors = totals.factors.get(term.name, {})
        coefs = [term.coef_at(totals.step) * factors.get(layer, 1.0) for layer in records]
        if len(set(coefs)) == 1:
            weighted = coefs[0] * values_L.sum()
        else:
            weighted = torch.stack([c * v for c, v in zip(coefs, values_L.unbind(), strict=True)]).sum()
        total = weighted if total is None else total + weighted
    return total, raw


def _value(term: LossTerm, routing: Routing, totals: StepTotals, layer: int) -> Tensor:
    try:
        return term.value(routing, totals, layer)
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}") from None
