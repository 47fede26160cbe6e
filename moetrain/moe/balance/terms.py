"""The losses of a config, and their sum over layers.

Shapes: L layers that have a record, by their places in the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from moetrain.bounds import range_refusal
from moetrain.moe.balance.base import LOSSES, LossSpec, Seen
from moetrain.moe.balance.options import read_options
from moetrain.moe.routing import RoutingRecord
from moetrain.nearest import nearest

ByLayer = Mapping[int, Tensor]
Records = Mapping[int, RoutingRecord]


@dataclass(frozen=True)
class StepTotals:
    """Figures of the whole optimizer step that a micro-batch's losses need.

    num_tokens   valid tokens of the global batch (all ranks, all micro-batches).
    counts       a term's key -> what it counts ahead, summed over the global batch, a layer.
    signals      tensors that controllers give: name -> a tensor a layer.
    factors      a loss's name -> what controllers multiply its coefficient with, a layer.
    step         the optimizer step, from 0, for coefficients that change.
    layer_tokens a layer's place -> the valid tokens that it sees, where these are fewer.
    """

    num_tokens: float
    counts: Mapping[str, ByLayer] = field(default_factory=dict)
    signals: Mapping[str, ByLayer] = field(default_factory=dict)
    factors: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    step: int = 0
    layer_tokens: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LossTerm:
    """One configured loss: its registered name, its coefficient, scope and options (None: its defaults).

    With ``final_coef`` the coefficient goes linearly to it until step ``final_step``. From ``stop_step`` on
    the loss is neither computed nor reported.
    Raises ValueError, which begins with the key, for a name that is not known, a scope that the loss has not,
    and an option out of its range.
    """

    name: str
    coef: float
    scope: str
    final_coef: float | None = None
    final_step: int = 0
    options: object | None = None
    stop_step: int | None = None

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise ValueError(f"name={self.name} is not known{nearest(self.name, LOSSES)}")
        if (scopes := self.spec.scopes) and self.scope not in scopes:
            *others, last = scopes
            offered = f"{', '.join(others)} or {last}" if others else last
            raise ValueError(f"scope={self.scope} is not offered for {self.name}: take {offered}")
        if self.options is None:
            object.__setattr__(self, "options", self.spec.options())
        elif line := range_refusal(self.options, "options"):
            raise ValueError(line)

    @property
    def spec(self) -> LossSpec[Any]:
        return LOSSES[self.name]

    @property
    def key(self) -> str:
        """The name of the term in metrics."""
        return f"{self.name}_{self.scope}" if self.spec.scopes else self.name

    @property
    def counts_ahead(self) -> bool:
        """Whether the loss needs the whole step's counts before the first backward pass."""
        return self.spec.ahead is not None and (not self.spec.scopes or self.scope == "global_batch")

    def is_on(self, step: int) -> bool:
        """Whether step ``step`` (from 0) has the loss."""
        return self.stop_step is None or step < self.stop_step

    def coef_at(self, step: int) -> float:
        if self.final_coef is None:
            return self.coef
        share = min(step / self.final_step, 1.0) if self.final_step else 1.0
        return self.coef + share * (self.final_coef - self.coef)

    def value(self, routing: RoutingRecord, totals: StepTotals, layer: int) -> Tensor:
        """This micro-batch's contribution in layer ``layer``, a scalar without coefficient."""
        signals = {name: by_layer[layer] for name, by_layer in totals.signals.items() if layer in by_layer}
        ahead = totals.counts.get(self.key, {}).get(layer)
        num_tokens = totals.layer_tokens.get(layer, totals.num_tokens)
        seen = Seen(layer, self.scope, self.options, num_tokens, ahead, signals)
        return self.spec.value(routing, seen)

    def count(self, routing: RoutingRecord) -> Tensor:
        """This micro-batch's part of the sum over the global batch that ``value`` needs."""
        assert self.spec.ahead is not None
        return self.spec.ahead(routing, self.options)


class LossOptions(Protocol):
    """The fields of one loss in a config. ``scope`` is a string or an enum of strings."""

    @property
    def name(self) -> str: ...
    @property
    def scope(self) -> Any: ...
    @property
    def coef(self) -> float: ...
    @property
    def final_coef(self) -> float | None: ...
    @property
    def final_step(self) -> int: ...
    @property
    def stop_step(self) -> int | None: ...
    @property
    def options(self) -> Mapping[str, object]: ...


def make_terms(losses: Sequence[LossOptions]) -> list[LossTerm]:
    """The terms of a config's list of losses.

    Raises ValueError, in one line that begins with the key below ``balance``, for what a loss refuses, and
    where one is named twice.
    """
    terms = []
    for place, x in enumerate(losses):
        if line := range_refusal(x, f"losses.{place}"):
            raise ValueError(line)
        scope = x.scope.value if isinstance(x.scope, Enum) else str(x.scope)
        try:
            term = LossTerm(x.name, float(x.coef), scope, x.final_coef, x.final_step)
        except ValueError as error:
            raise ValueError(f"losses.{place}.{error}") from None
        try:
            options = read_options(term.spec.options, x.options)
        except ValueError as error:
            raise ValueError(f"losses.{place}.options.{error}") from None
        terms.append(replace(term, options=options, stop_step=x.stop_step))
    if len({t.key for t in terms}) < len(terms):
        raise ValueError(f"losses names a loss twice: {', '.join(t.key for t in terms)}")
    return terms


def count_ahead(
    batches: Sequence[Records], terms: Sequence[LossTerm], step: int = 0
) -> dict[str, dict[int, Tensor]]:
    """A term's key -> what it counts ahead in each layer, summed over micro-batches; not yet over ranks.

    Of the terms that step ``step`` has.

    Raises ValueError that names the layer where a record lacks what a loss needs.
    """
    return {term.key: _counted(batches, term) for term in terms if term.counts_ahead and term.is_on(step)}


def total_loss(
    records: Records, terms: Sequence[LossTerm], totals: StepTotals
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(coefficient-weighted sum over layers and terms, raw values per term [L], detached for logging).

    Each layer's loss is added with the full coefficient (Switch, Megatron-Core), not averaged over layers.
    L are the layers of ``records`` in their order. Raises ValueError that names the layer where a record
    lacks what a loss needs.
    """
    total: Tensor | None = None
    raw: dict[str, Tensor] = {}
    if not records:
        return None, {}
    for term in (term for term in terms if term.is_on(totals.step)):
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


def _value(term: LossTerm, routing: RoutingRecord, totals: StepTotals, layer: int) -> Tensor:
    try:
        return term.value(routing, totals, layer)
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}") from None


def _counted(batches: Sequence[Records], term: LossTerm) -> dict[int, Tensor]:
    layers = batches[0] if batches else {}
    counted = {}
    for layer in layers:
        try:
            counts = [term.count(records[layer]) for records in batches]
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from None
        counted[layer] = torch.stack(counts).sum(0)
    return counted
