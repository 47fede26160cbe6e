"""Alarms on routing. Each reads one step's figures by layer; what several steps say is the watch's.

Shapes: E experts of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moetrain.train.alarms.figures import WHOLE, Reading, StepFigures


class Collapse:
    """Few experts are wanted by all tokens.

    The number of experts in use is e to the power of the entropy of the demand: E in perfect balance, and k
    where all tokens want the same k. The limit lies the share ``limit`` of the way from k to E. A layer whose
    tokens want more than a third of its experts is passed over.
    """

    name = "collapse"

    def __init__(self, limit: float) -> None:
        self._limit = limit

    def look(self, figures: StepFigures) -> dict[int, Reading]:
        found = {}
        for layer, demand_E in figures.demand.items():
            experts, total = len(demand_E), int(demand_E.sum())
            tokens = _tokens(figures, layer)
            if experts < 2 or not total or not tokens:
                continue
            wanted = max(1.0, total / tokens)
            used = _in_use(demand_E / total)
            bad = 3 * wanted <= experts and used <= wanted + self._limit * (experts - wanted)
            why = f"{used:.1f} of {experts} experts are in use, for {wanted:.1f} a token"
            found[layer] = Reading(bad, used, why)
        return found


class DeadExperts:
    """Experts without an assignment for ``steps`` steps. ``idle``: a layer -> steps without, by expert."""

    name = "dead_experts"
    patience = 1  # it has waited already

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self.idle: dict[int, NDArray[np.int64]] = {}

    def look(self, figures: StepFigures) -> dict[int, Reading]:
        found = {}
        for layer, computed_E in figures.computed.items():
            before_E = self.idle.get(layer)
            if before_E is None or len(before_E) != len(computed_E):
                before_E = np.zeros(len(computed_E), np.int64)
            self.idle[layer] = idle_E = np.where(computed_E > 0, 0, before_E + 1)
            dead = int((idle_E >= self._steps).sum())
            why = f"{dead} of {len(idle_E)} experts had no token for {self._steps} steps or more"
            found[layer] = Reading(dead > 0, float(dead), why)
        return found


class LowEntropy:
    """The router's scores have the share ``limit`` of a uniform router's entropy, or less."""

    name = "low_entropy"

    def __init__(self, limit: float) -> None:
        self._limit = limit

    def look(self, figures: StepFigures) -> dict[int, Reading]:
        found = {}
        for layer, counts_E in figures.computed.items():
            entropy = figures.row.get(f"moe/{layer}/entropy")
            if entropy is None or len(counts_E) < 2:
                continue
            most = math.log(len(counts_E))
            why = f"the entropy of the scores is {entropy:.3g} nats, of {most:.3g} of a uniform router"
            found[layer] = Reading(not entropy > self._limit * most, entropy, why)
        return found


class LargeLogits:
    """The router's logits have a root mean square above ``limit``."""

    name = "large_logits"

    def __init__(self, limit: float) -> None:
        self._limit = limit

    def look(self, figures: StepFigures) -> dict[int, Reading]:
        found = {}
        for layer in figures.computed:
            rms = figures.row.get(f"moe/{layer}/logit_rms")
            if rms is not None:
                why = f"the router's logits have a root mean square of {rms:.3g}, above {self._limit:g}"
                found[layer] = Reading(not rms <= self._limit, rms, why)
        return found


Ranks = Mapping[int, Sequence[Sequence[int]]]  # a layer -> the experts of each rank of parallel.ep


class ImbalanceCost:
    """Ranks of ``parallel.ep`` wait for the busiest of them for more than the share ``limit`` of a step.

    With s the share of a balanced step that experts compute and i the busiest rank's assignments over the
    mean, summed over layers, a step takes 1 - s + s i: an estimate, by operations.
    """

    name = "imbalance_cost"

    def __init__(self, limit: float, ranks: Ranks, experts_share: float) -> None:
        self._limit, self._ranks, self._share = limit, ranks, experts_share

    def look(self, figures: StepFigures) -> dict[int, Reading]:
        most, mean, worst = 0.0, 0.0, (0.0, WHOLE)
        for layer, of_ranks in self._ranks.items():
            counts_E = figures.computed.get(layer)
            if counts_E is None or len(of_ranks) < 2:
                continue
            loads = [float(counts_E[list(experts)].sum()) for experts in of_ranks]
            most, mean = most + max(loads), mean + sum(loads) / len(loads)
            if sum(loads):
                worst = max(worst, (max(loads) * len(loads) / sum(loads), layer))
        if not mean:
            return {}
        extra = self._share * (most / mean - 1)
        cost = extra / (1 + extra)
        why = (
            f"ranks of parallel.ep wait {cost:.0%} of the step for the busiest, which has {worst[0]:.1f} "
            f"times the mean load in layer {worst[1]}"
        )
        return {WHOLE: Reading(cost > self._limit, cost, why)}


def _tokens(figures: StepFigures, layer: int) -> float:
    """Tokens of the step: what was computed over how much of it a token has."""
    each = figures.row.get(f"moe/{layer}/experts_per_token", 0.0)
    return float(figures.computed[layer].sum()) / each if each else 0.0


def _in_use(share_E: NDArray[np.float64]) -> float:
    used_E = share_E[share_E > 0]
    return math.exp(-float((used_E * np.log(used_E)).sum()))
