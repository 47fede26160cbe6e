"""The backends of the experts' operator, and the choice among them: the one table.

``auto`` begins at the top of the device's ladder, a name at its own rung. The first rung that does not refuse
the case and passes its self-test computes; whatever is passed over is said once, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from moetrain.ops.cpu import per_expert
from moetrain.ops.experts import (
    grouped,
    megablocks_sparse,
    scattermoe_grouped,
    triton_block_sparse,
    triton_grouped,
)
from moetrain.ops.experts.case import Case
from moetrain.ops.experts.operands import Operands
from moetrain.ops.experts.passed import keep_passed, was_passed
from moetrain.ops.experts.rows import Segments
from moetrain.ops.experts.self_test import failure
from moetrain.ops.kernel_or_torch import AUTO
from moetrain.ops.say_once import say_once

LOOP = "loop"  # the oracle takes whatever is asked, and is not tested against itself


class Backend(Protocol):
    """The interface of a backend, which is a module. Shapes as in ``operator.py``."""

    ON_DEVICE: bool  # whether it needs no counts on the host, so that nothing waits for them
    WIDTH_UNIT: int  # widths with the same remainder by it take the same paths

    def refusal(self, case: Case) -> str | None:
        """The reason why it cannot compute ``case``; None if it can."""

    def kept_rows(self, segments: Segments, rows: int, dtype: torch.dtype) -> list[int]:
        """The rows of each pre-activation that :meth:`forward` keeps, of ``rows`` R."""

    def forward(self, operands: Operands, keep: bool) -> tuple[Tensor, list[Tensor]]:
        """(out [R, D], the pre-activations; none if not ``keep``)."""

    def backward(
        self, dout_RD: Tensor, operands: Operands, kept: Sequence[Tensor] | None
    ) -> tuple[Tensor, ...]:
        """(dx [R, D], dweights [R], dw_up, dw_down); experts without rows get zero gradients.

        With biases, which a backend may refuse, those of both follow.
        ``kept``: what :meth:`forward` returned; None: it is computed again, to the same bits.
        """


BACKENDS: dict[str, Backend] = {
    "triton": triton_grouped,
    "torch": grouped,
    "cpu": per_expert,
    "triton_block_sparse": triton_block_sparse,
    "megablocks": megablocks_sparse,
    "scattermoe": scattermoe_grouped,
}
NAMES = (AUTO, LOOP, *BACKENDS)
ADDING = ("torch", "cpu")  # those that compute low-rank products beside the matrices
BY_NAME = ("triton_block_sparse", "megablocks", "scattermoe")  # never by AUTO; see their modules
# Best first; LOOP is the last of each.
_LADDER = ("triton", "torch", "cpu")
_CPU_LADDER = ("cpu",)
_TRACED_CPU_LADDER = ("torch", "cpu")
_tested: dict[tuple[str, Case], str | None] = {}


def choose(asked: str, case: Case) -> str:
    """The backend that computes ``case`` where ``asked`` is in the config.

    Raises ValueError for an unknown one.
    """
    if asked not in NAMES:
        raise ValueError(f"unknown experts backend {asked!r}; known: {', '.join(NAMES)}")
    shape = (case.device, case.dtype, case.d_model, case.d_ff, case.activation, case.block)
    of_case = (*shape, case.keep, case.bias, case.added)
    chosen: str = _choose(asked, torch.compiler.is_compiling(), *of_case)
    return chosen


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # so that nobody traces a self-test
def _choose(asked: str, traced: bool, *of_case: Any) -> str:
    case, reasons = Case(*of_case), list[str]()
    for name in _rungs(asked, ladder(case.device, traced)):
        reason = why_not(name, case)
        if reason is None:
            if reasons:
                say_once(f"experts backend {asked}: {'; '.join(reasons)}; taking {name}")
            return name
        reasons.append(f"{name}: {reason}" if name != asked else reason)
    raise AssertionError("the last rung refuses nothing")


def why_not(name: str, case: Case) -> str | None:
    """The reason why the backend ``name`` does not compute ``case``; None if it does."""
    if name == LOOP:
        return None
    if case.added and name not in ADDING:
        return "it has no low-rank products beside the matrices"
    return BACKENDS[name].refusal(case) or _self_test(name, case.small(BACKENDS[name].WIDTH_UNIT))


def on_device(asked: str, case: Case) -> bool:
    """Whether what computes ``case`` needs no counts on the host."""
    chosen = choose(asked, case)
    return chosen != LOOP and BACKENDS[chosen].ON_DEVICE


def ladder(device: torch.device, traced: bool = False) -> tuple[str, ...]:
    """The backends of a device, best first. A traced layer begins with one that needs no host counts."""
    if device.type != "cpu":
        return (*_LADDER, LOOP)
    return (*(_TRACED_CPU_LADDER if traced else _CPU_LADDER), LOOP)


def _rungs(asked: str, rungs: tuple[str, ...]) -> tuple[str, ...]:
    if asked == AUTO:
        return rungs
    return (asked, *(rungs[rungs.index(asked) + 1 :] if asked in rungs else rungs))


def _self_test(name: str, case: Case) -> str | None:
    """What is wrong with the backend on this device; tested once a process, on a GPU until it has passed."""
    key = (name, case)
    if key not in _tested:
        _tested[key] = None if was_passed(*key) else failure(BACKENDS[name], case)
        if _tested[key] is None:
            keep_passed(*key)
    return _tested[key]
