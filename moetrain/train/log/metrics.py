"""The metrics of a step: routing statistics, and the rows of ``metrics.jsonl``.

Every key of ``metrics.jsonl`` is made here and documented in ``docs/metrics.md``.

Shapes: E experts of one layer, C sums of one layer (``layer_sums.py``), F the C of all layers, one layer's
after another's.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.routing import RoutingRecord
from moetrain.parallel.watchdog.flight_recorder import watched
from moetrain.train.log.layer_sums import SUMS, sums_C

MAX_DOMAINS = 32  # evaluation keys stay bounded: the smaller domains are pooled as OTHER_DOMAINS
OTHER_DOMAINS = "other"


class RoutingStats:
    """Sums of one step's routing decisions, per MoE layer, over any number of micro-batches.

    The layers are those that records come from, each with experts of its own number. The sums live on
    ``device`` and nothing waits for it before a :class:`RoutingSummary` is read. Counts come only from the
    records handed to :meth:`add`, so a forward pass that runs twice (activation recompute) counts once.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self._experts: dict[int, int] = {}
        self._sums_F: Tensor | None = None

    @torch.no_grad()
    def add(self, records: Mapping[int, RoutingRecord]) -> None:
        """Count one micro-batch: a layer's place in the decoder -> its record.

        Raises ValueError where another micro-batch of the step had other layers, or other experts in them.
        """
        experts = {layer: r.num_experts for layer, r in records.items()}
        if self._sums_F is not None and experts != self._experts:
            raise ValueError(
                f"a step's records are of layers with {self._experts} and with {experts} experts"
            )
        self._experts = experts
        sums = [sums_C(r) for r in records.values()]
        sums_F = torch.cat([torch.zeros(0, dtype=torch.float64, device=self.device), *sums])
        self._sums_F = sums_F if self._sums_F is None else self._sums_F + sums_F

    def reduce(self, group: dist.ProcessGroup | None = None) -> RoutingSummary:
        """The sums over ``group`` (None: this process alone) since the last call; starts again from zero.

        One all-reduce for all layers, and none for a model without MoE layers.
        """
        experts, sums_F = self._experts, self._sums_F
        self._experts, self._sums_F = {}, None
        if sums_F is None:
            sums_F = torch.zeros(0, dtype=torch.float64, device=self.device)
        if group is not None and experts:
            with watched("the routing metrics", group=group):
                dist.all_reduce(sums_F, group=group)
        return RoutingSummary(experts, sums_F)


@dataclass(frozen=True)
class RoutingSummary:
    """One step's sums, on the device that summed them, or on the host where the step has read them.

    ``experts``: a layer's place in the decoder -> the number of its experts; all below goes by that place.
    """

    experts: Mapping[int, int]
    sums_F: Tensor

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.experts)

    @property
    def counts(self) -> dict[int, Tensor]:
        """Assignments computed per expert, int64 [E] a layer."""
        return {layer: own_C[: self.experts[layer]].long() for layer, own_C in self._by_layer().items()}

    @property
    def demand(self) -> dict[int, Tensor]:
        """Assignments wanted before any capacity, int64 [E] a layer: what controllers need."""
        rows = self._by_layer().items()
        return {layer: own_C[self.experts[layer] : 2 * self.experts[layer]].long() for layer, own_C in rows}

    def metrics(self) -> dict[str, float]:
        """``moe/<layer>/<name>`` -> value, nine or fewer per layer. See ``docs/metrics.md``."""
        row: dict[str, float] = {}
        for layer, own_C in self._by_layer().items():
            figures = _layer_metrics(own_C.tolist(), self.experts[layer])
            row |= {f"moe/{layer}/{k}": v for k, v in figures.items()}
        return row

    def load(self) -> dict[int, list[float]]:
        """Each expert's share of its layer's assignments, four digits; all 0 where nothing was routed."""
        rows = {}
        for layer, kept_E in self.counts.items():
            kept = kept_E.tolist()
            total = sum(kept)
            rows[layer] = [float(f"{n / total:.4g}") if total else 0.0 for n in kept]
        return rows

    def load_row(self, step: int) -> dict[str, Any]:
        """A row of ``load.jsonl``."""
        return {"step": step, "layers": list(self.layers), "load": list(self.load().values())}

    def _by_layer(self) -> dict[int, Tensor]:
        sizes = [2 * experts + SUMS for experts in self.experts.values()]
        return dict(zip(self.experts, self.sums_F.split(sizes), strict=True)) if sizes else {}


def _layer_metrics(sums: list[float], num_experts: int) -> dict[str, float]:
    kept = sums[:num_experts]
    demand = sum(sums[num_experts : 2 * num_experts])
    granted, entropy, scored, squares, with_logits, tokens, chunks, used = sums[2 * num_experts :]
    mean = sum(kept) / num_experts
    deviation = math.sqrt(sum((n - mean) ** 2 for n in kept) / num_experts)
    metrics = {
        "max_load": max(kept) / mean if mean else 0.0,
        "load_cv": deviation / mean if mean else 0.0,
        "dead_experts": float(sum(n == 0 for n in kept)),
        "drop_rate": (demand - granted) / demand if demand else 0.0,
        "experts_per_token": sum(kept) / tokens if tokens else 0.0,
    }
    metrics["token_sparsity"] = 1 - metrics["experts_per_token"] / num_experts
    if chunks:
        metrics["chunk_sparsity"] = 1 - used / (chunks * num_experts)
    if scored:
        metrics["entropy"] = entropy / scored
    if with_logits:
        metrics["logit_rms"] = math.sqrt(squares / with_logits)
    return metrics


def load_every(steps: int, rows: int = 200) -> int:
    """The interval, in steps, that gives ``load.jsonl`` of a run of ``steps`` steps at most ``rows`` rows."""
    return max(1, math.ceil(steps / rows))


def step_row(
    *,
    step: int,
    tokens: int,
    loss: float,
    lr: float,
    grad_norm: float,
    tokens_per_second: float,
    routing: RoutingSummary | None = None,
    aux: Mapping[str, Sequence[float]] | None = None,
    control: Mapping[str, float] | None = None,
    ahead: Sequence[float] = (),
) -> dict[str, float]:
    """A row of ``metrics.jsonl`` for one optimizer step.

    ``aux``: loss name -> one value per MoE layer. ``control``: figures of the balance controllers.
    ``ahead``: nats of each layer that predicts further tokens.
    """
    row: dict[str, float] = {
        "step": step,
        "tokens": tokens,
        "train/loss": loss,
        "train/lr": lr,
        "train/grad_norm": grad_norm,
        "tokens_per_second": tokens_per_second,
    }
    row |= {f"train/loss_future_{depth}": nats for depth, nats in enumerate(ahead, 1)}
    if routing is not None:
        row |= routing.metrics()
        for name, values in (aux or {}).items():
            pairs = zip(routing.layers, values, strict=True)
            row |= {f"moe/{layer}/aux/{name}": value for layer, value in pairs}
    row |= {f"balance/{name}": value for name, value in (control or {}).items()}
    return row | {"time": time.time()}


@dataclass(frozen=True)
class EvalSums:
    """Sums over predicted tokens: cross entropy in nats, the tokens, and the bytes of text they stand for."""

    nats: float
    tokens: int
    bytes: int

    def __add__(self, other: EvalSums) -> EvalSums:
        return EvalSums(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if not self.loss > 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


def eval_row(
    step: int,
    tokens: int,
    total: EvalSums,
    domains: Mapping[str, EvalSums] | None = None,
    modes: Mapping[str, EvalSums] | None = None,
    routing: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """A row of ``metrics.jsonl`` for one evaluation after ``step`` steps and ``tokens`` training tokens.

    ``modes``: the same text by a router's other ways of routing in evaluation. ``routing``: what
    :class:`RoutingDiagnostics` tells.
    """
    row: dict[str, float] = {
        "step": step,
        "tokens": tokens,
        "val/loss": total.loss,
        "val/perplexity": total.perplexity,
        "val/bits_per_byte": total.bits_per_byte,
    }
    row |= {f"val/loss_{name}": sums.loss for name, sums in (modes or {}).items()}
    for name, sums in _largest(domains or {}).items():
        row |= {f"val/{name}/loss": sums.loss, f"val/{name}/bits_per_byte": sums.bits_per_byte}
    return row | dict(routing or {}) | {"time": time.time()}


def _largest(domains: Mapping[str, EvalSums]) -> dict[str, EvalSums]:
    if len(domains) <= MAX_DOMAINS:
        return dict(domains)
    ranked = sorted(domains.items(), key=lambda item: (-item[1].tokens, item[0]))
    kept = dict(ranked[: MAX_DOMAINS - 1])
    rest = [sums for _, sums in ranked[MAX_DOMAINS - 1 :]]
    return kept | {OTHER_DOMAINS: sum(rest, kept.pop(OTHER_DOMAINS, EvalSums(0.0, 0, 0)))}


def key_pattern(key: str) -> str:
    """The documented form of a key: ``moe/3/entropy`` -> ``moe/<layer>/entropy``."""
    key = re.sub(r"^moe/\d+/", "moe/<layer>/", key)
    key = re.sub(r"^moe/<layer>/aux/.+", "moe/<layer>/aux/<loss>", key)
    key = re.sub(r"^train/loss_future_\d+$", "train/loss_future_<depth>", key)
    key = re.sub(r"^val/loss_.+$", "val/loss_<mode>", key)
    return re.sub(r"^val/.+/(loss|bits_per_byte)$", r"val/<domain>/\1", key)


def worst_load(row: Mapping[str, Any]) -> tuple[int, float] | None:
    """The layer with the largest ``max_load`` of a step's row, and the value; None without MoE layers."""
    loads = [(v, int(k.split("/")[1])) for k, v in row.items() if re.fullmatch(r"moe/\d+/max_load", k)]
    return (worst[1], worst[0]) if (worst := max(loads, default=None)) else None
