"""Findings of ranks against those of one process: one check a scenario and kind of quantity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.verify.measure import Findings

_KINDS = {
    "loss": "losses",
    "norm": "norms",
    "gradient": "gradients",
    "weight": "weights, states",
    "state": "routing figures",
    "bits": "tensors to the bit",
}


@dataclass(frozen=True)
class Check:
    """``number`` quantities were compared, ``apart`` of them differ by more than ``tolerance``.

    ``worst`` is the largest difference, relative where the reference exceeds 1, and ``where`` it occurs.
    ``binding``: whether it must hold.
    """

    scenario: str
    kind: str
    number: int
    apart: int
    worst: float
    where: str
    tolerance: float
    binding: bool = True

    @property
    def holds(self) -> bool:
        return not self.apart

    @property
    def what(self) -> str:
        return _KINDS[self.kind]

    @property
    def problem(self) -> str:
        return (
            f"{self.scenario}: {self.apart} of {self.number} {self.what} differ, by {self.worst:.1e} at most "
            f"({self.tolerance:g} is allowed), in {self.where}"
        )


def compare(
    reference: Findings, ranks: Sequence[Findings], tolerance: float, loose: Iterable[str] = ()
) -> list[Check]:
    """Every quantity of every rank against ``reference``; ``bits`` must be equal, others to ``tolerance``.

    ``loose``: scenarios whose weights and what follows from them are reported but need not agree.
    """
    checks = []
    for scenario, quantities in reference.items():
        for kind in _KINDS:
            names = [name for name in quantities if name.startswith(f"{kind}: ")]
            for found in ranks:  # what only a rank has is a difference too
                names += [n for n in found.get(scenario, {}) if n.startswith(f"{kind}: ") and n not in names]
            if names:
                limit = 0.0 if kind == "bits" else tolerance
                check = _check(scenario, kind, names, quantities, [r.get(scenario, {}) for r in ranks], limit)
                checks.append(check)
    bound = {s for s in reference if s not in set(loose)}
    return [c if c.scenario in bound else _unbound(c) for c in checks]


def replicas(ranks: Sequence[Findings], scenario: str) -> Check:
    """Whatever every rank holds of the weights and states after ``scenario`` has the same bits."""
    first = {name: value for name, value in ranks[0][scenario].items() if name.startswith("weight: ")}
    others = [{f"bits{name.removeprefix('weight')}": v for name, v in r[scenario].items()} for r in ranks[1:]]
    mine = {f"bits{name.removeprefix('weight')}": value for name, value in first.items()}
    return _check(f"{scenario}, on all ranks", "bits", list(mine), mine, others, 0.0)


def _check(
    scenario: str,
    kind: str,
    names: Sequence[str],
    reference: dict[str, Tensor],
    ranks: Sequence[dict[str, Tensor]],
    tolerance: float,
) -> Check:
    worst, where, beyond = 0.0, "", set()
    for name in names:
        for number, found in enumerate(ranks):
            apart = _difference(reference.get(name), found.get(name), exact=kind == "bits")
            if apart > tolerance:
                beyond.add(name)
            if apart > worst:
                worst, where = apart, f"{name.partition(': ')[2]} on rank {number}"
    return Check(scenario, kind, len(names), len(beyond), worst, where, tolerance)


def _difference(expected: Tensor | None, found: Tensor | None, exact: bool) -> float:
    if expected is None or found is None or expected.shape != found.shape or expected.dtype != found.dtype:
        return math.inf
    if torch.equal(expected, found):
        return 0.0
    one, other = expected.double(), found.double()
    apart = float((one - other).abs().max() / max(1.0, float(one.abs().max())))
    return math.inf if math.isnan(apart) else max(apart, 5e-324) if exact else apart


def _unbound(check: Check) -> Check:
    return Check(**{**vars(check), "binding": False})
