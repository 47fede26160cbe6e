"""How far two bf16 evaluations of one step may lie apart, and whether the ranks' and one process's do.

The bound is derived, not chosen. A gradient is the end of a chain of R results that are each rounded to bf16,
relative to their size by at most u = 2^-8. Roundings are independent, and blocks before a norm pass relative
errors on without enlarging them, so the error of the whole is at most ``z u sqrt(R)`` of its norm, but with
probability 2 exp(-z^2 / 2) (Higham and Mary 2019, "A New Approach to Probabilistic Rounding Error Analysis",
theorem 2.4). Two evaluations differ by sqrt(2) times that. Weights are rounded alike in both; sums in fp32
add 2^-16 of this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moetrain.models.options import ModelConfig
from moetrain.verify.compare import Check
from moetrain.verify.measure import DEMAND, Wholes

_U = 2.0**-8
_UNLIKELY = 1e-6  # of one quantity; a proof compares about a hundred
# norm, projection, rotation, softmax's weights, weighted values, projection, sum;
# norm, up, activation, product with up, routing weight, down, sum of a token's rows, sum
_OF_A_BLOCK = 15
_OF_THE_REST = 6  # embedding, norm, logits, their gradient; a weight's gradient, its sum over ranks


def roundings(model: ModelConfig) -> int:
    """R: forward and back through every block."""
    return 2 * _OF_A_BLOCK * (model.num_layers + model.future.layers) + _OF_THE_REST


def bound(model: ModelConfig) -> float:
    """Of the difference of two evaluations, relative to the norm."""
    z = math.sqrt(2 * math.log(2 / _UNLIKELY))
    return math.sqrt(2 * roundings(model)) * z * _U


def compare_rounded(model: ModelConfig, reference: Wholes, ranks: Sequence[Wholes]) -> list[Check]:
    """Losses, norms and the gradient of every module, by scenario.

    A token whose scores are nearer to each other than their rounding may go to another expert, which no bound
    of roundings covers: where ranks and process assigned differently, the scenario is reported, not binding.
    """
    checks = []
    for scenario, expected in reference.items():
        found = [rank[scenario] for rank in ranks]
        alike = all(torch.equal(expected[DEMAND], other[DEMAND]) for other in found)
        for kind in ("loss", "norm", "gradient"):
            checks.append(_check(f"{scenario}, in bf16", kind, expected, found, bound(model), alike))
    return checks


def _check(
    scenario: str,
    kind: str,
    expected: dict[str, Tensor],
    found: list[dict[str, Tensor]],
    limit: float,
    binding: bool,
) -> Check:
    worst, where, beyond = 0.0, "", set()
    wanted = dict(_vectors(kind, expected))
    for number, other in enumerate(found):
        theirs = dict(_vectors(kind, other))
        for name, vector in wanted.items():
            apart = _apart(vector, theirs[name]) if expected.keys() == other.keys() else math.inf
            if not apart <= limit:
                beyond.add(name)
            if not apart <= worst:
                worst, where = apart, f"{name} on rank {number}"
    return Check(scenario, kind, len(wanted), len(beyond), worst, where, limit, binding)


def _apart(vector: Tensor, other: Tensor) -> float:
    return float((vector - other).norm() / vector.norm().clamp(min=torch.finfo().tiny))


def _vectors(kind: str, quantities: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The quantities of a kind; gradients by module, since a bias's may be nothing but rounding."""
    of_kind = {
        name.partition(": ")[2]: value.double().flatten()
        for name, value in quantities.items()
        if name.startswith(f"{kind}: ")
    }
    if kind != "gradient":
        yield from of_kind.items()
        return
    modules = dict.fromkeys(name.rpartition(".")[0] for name in of_kind)
    for module in modules:
        yield (
            module or "embedding and head",
            torch.cat([v for name, v in of_kind.items() if name.rpartition(".")[0] == module]),
        )
