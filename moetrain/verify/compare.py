"""Findings of ranks against those of one process: one check a scenario and kind of quantity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.verify.measure import Findings
from moetrain.verify.part import Part, all_there

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
    """What every rank holds of every quantity against ``reference``, which is whole.

    ``bits`` must be equal, others to ``tolerance``; and the ranks together must hold all of it.

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
    """Ranks that hold the same part of a weight or state after ``scenario`` hold the same bits."""
    names = [name for name in ranks[0][scenario] if name.startswith("weight: ")]
    worst = _Worst()
    for name in names:
        first: dict[object, Tensor] = {}
        for number, rank in enumerate(ranks):
            part = rank[scenario].get(name)
            value = None if part is None else first.setdefault(part.place, part.value)
            worst.add(name, number, _difference(value, None if part is None else part.value, exact=True), 0.0)
    return worst.check(f"{scenario}, on all ranks", "bits", len(names), 0.0)


def _check(
    scenario: str,
    kind: str,
    names: Sequence[str],
    reference: dict[str, Part],
    ranks: Sequence[dict[str, Part]],
    tolerance: float,
) -> Check:
    worst = _Worst()
    for name in names:
        expected = reference.get(name)
        parts = [found.get(name) for found in ranks]
        complete = expected is not None and all_there([part for part in parts if part is not None])
        for number, part in enumerate(parts):
            apart = math.inf
            if complete and expected is not None and part is not None and part.shape == expected.shape:
                apart = _difference(part.of(expected.value), part.value, exact=kind == "bits")
            worst.add(name, number, apart, tolerance)
    return worst.check(scenario, kind, len(names), tolerance)


class _Worst:
    """The largest difference so far, and the quantities whose own exceeds the tolerance."""

    def __init__(self) -> None:
        self._apart, self._where, self._beyond = 0.0, "", set[str]()

    def add(self, name: str, rank: int, apart: float, tolerance: float) -> None:
        if apart > tolerance:
            self._beyond.add(name)
        if apart > self._apart:
            self._apart, self._where = apart, f"{name.partition(': ')[2]} on rank {rank}"

    def check(self, scenario: str, kind: str, number: int, tolerance: float) -> Check:
        return Check(scenario, kind, number, len(self._beyond), self._apart, self._where, tolerance)


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
