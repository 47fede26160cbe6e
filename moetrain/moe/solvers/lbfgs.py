"""Limited-memory BFGS for many small problems at once, each of which goes its own way.

Shapes: G problems, N variables each. Source: Nocedal 1980; Nocedal and Wright 2006, algorithm 7.4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_MEMORY, _HALVINGS, _ARMIJO = 8, 20, 1e-4

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]  # x [G, N] -> values [G], gradients [G, N]


def minimize(objective: Objective, start_GN: Tensor, iterations: int, tolerance: float) -> Tensor:
    """Where each problem's gradient has no element above ``tolerance``, or where ``iterations`` have led.

    Steps are halved until the value has fallen enough; a problem in which none falls stays where it is, as
    one without a slope at a kink does. No problem looks at another, so that each ends as it would alone.
    """
    x_GN, pairs = start_GN, _Pairs()
    value_G, slope_GN = objective(x_GN)
    going_G = slope_GN.abs().amax(-1) > tolerance
    for i in range(iterations):
        if not bool(going_G.any()):
            break
        step_GN = pairs.direction(slope_GN)
        descent_G = (step_GN * slope_GN).sum(-1)
        uphill_G = ~(descent_G < 0)
        step_GN = torch.where(uphill_G[:, None], -slope_GN, step_GN)
        descent_G = torch.where(uphill_G, -slope_GN.square().sum(-1), descent_G)
        first = 1 / slope_GN.abs().sum(-1).clamp(min=1.0) if i == 0 else torch.ones_like(descent_G)
        new_GN, new_value_G, new_slope_GN, moved_G = _search(
            objective, x_GN, value_G, slope_GN, step_GN, descent_G, first, going_G
        )
        pairs.add(new_GN - x_GN, new_slope_GN - slope_GN, moved_G)
        x_GN, value_G, slope_GN = new_GN, new_value_G, new_slope_GN
        going_G = going_G & moved_G & (slope_GN.abs().amax(-1) > tolerance)
    return x_GN


def _search(
    objective: Objective,
    x_GN: Tensor,
    value_G: Tensor,
    slope_GN: Tensor,
    step_GN: Tensor,
    descent_G: Tensor,
    length_G: Tensor,
    going_G: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(points, values, gradients, which have moved) after steps halved until they are good enough."""
    best = x_GN, value_G, slope_GN
    moved_G, open_G = torch.zeros_like(going_G), going_G
    for _ in range(_HALVINGS):
        try_GN = x_GN + length_G[:, None] * step_GN
        new_value_G, new_slope_GN = objective(try_GN)
        good_G = open_G & (new_value_G <= value_G + _ARMIJO * length_G * descent_G)
        keep_G1 = good_G[:, None]
        best = (
            torch.where(keep_G1, try_GN, best[0]),
            torch.where(good_G, new_value_G, best[1]),
            torch.where(keep_G1, new_slope_GN, best[2]),
        )
        moved_G, open_G = moved_G | good_G, open_G & ~good_G
        if not bool(open_G.any()):
            break
        length_G = torch.where(open_G, length_G / 2, length_G)
    return *best, moved_G


class _Pairs:
    """The last steps and changes of the gradient, of which the directions are made."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, step_GN: Tensor, change_GN: Tensor, moved_G: Tensor) -> None:
        """A problem that has not moved, or that shows no curvature, is left out of the pair."""
        curvature_G = (step_GN * change_GN).sum(-1)
        small_G = curvature_G <= 1e-12 * change_GN.square().sum(-1)
        weight_G = torch.where(~moved_G | small_G, 0.0, 1 / torch.where(small_G, 1.0, curvature_G))
        self._pairs = [*self._pairs[1 - _MEMORY :], (step_GN, change_GN, weight_G)]

    def direction(self, slope_GN: Tensor) -> Tensor:
        """Minus an estimate of the inverse Hessian times the gradient: the two loops."""
        q_GN, parts = -slope_GN, []
        for step_GN, change_GN, weight_G in reversed(self._pairs):
            part_G = weight_G * (step_GN * q_GN).sum(-1)
            q_GN = q_GN - part_G[:, None] * change_GN
            parts.append(part_G)
        q_GN = q_GN * self._scale(slope_GN)[:, None]
        for (step_GN, change_GN, weight_G), part_G in zip(self._pairs, reversed(parts), strict=True):
            back_G = weight_G * (change_GN * q_GN).sum(-1)
            q_GN = q_GN + (part_G - back_G)[:, None] * step_GN
        return q_GN

    def _scale(self, slope_GN: Tensor) -> Tensor:
        """s y / y y of each problem's last pair, 1 before there is one."""
        scale_G = torch.ones_like(slope_GN[:, 0]) if slope_GN.shape[1] else slope_GN.sum(-1) + 1
        for _, change_GN, weight_G in self._pairs:
            used_G = weight_G > 0
            curved_G = 1 / (weight_G * change_GN.square().sum(-1)).where(used_G, 1.0)
            scale_G = torch.where(used_G, curved_G, scale_G)
        return scale_G
