"""The backends of attention, and the choice among them.

Shapes: B batch, S queries, K keys, Q query heads, G key and value heads, H head width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from moetrain.ops.attention import blocks, flex, sdpa, varlen
from moetrain.ops.attention.case import Case, Plan
from moetrain.ops.attention.self_test import failure
from moetrain.ops.precision import product_dtype
from moetrain.ops.say_once import say_once

AUTO = "auto"


class Backend(Protocol):
    """The interface of a backend, which is a module of this package."""

    def refusal(self, case: Case) -> str | None:
        """The reason why it cannot compute ``case``; None if it can."""

    def worthwhile(self, case: Case) -> bool:
        """Whether ``auto`` should take it for ``case``."""

    def prepare(self, case: Case) -> Plan:
        """The plan for ``case``, made once for all layers. Does not wait for the device."""

    def attend(
        self, q_BQSH: Tensor, k_BGKH: Tensor, v_BGKH: Tensor, plan: Plan, sinks_Q: Tensor | None = None
    ) -> Tensor:
        """:func:`attend`, differentiable in all four."""


BACKENDS: dict[str, Backend] = {"sdpa": sdpa, "blocks": blocks, "flex": flex, "varlen": varlen}
_LAST = "sdpa"  # takes whatever is asked; torch's public function, so it is not tested
_tested: dict[tuple[object, ...], str | None] = {}


def attend(
    q_BQSH: Tensor, k_BGKH: Tensor, v_BGKH: Tensor, plan: Plan, sinks_Q: Tensor | None = None
) -> Tensor:
    """[B, S, Q, H]: each query's mean of the values it sees, weighted by softmax(q k / sqrt(H)).

    ``sinks_Q``: a logit of each head that takes part in the softmax and has no value, where the plan's case
    has sinks. In the dtype of autocast, where it is on.
    """
    dtype = product_dtype(q_BQSH)
    operands = (q_BQSH.to(dtype), k_BGKH.to(dtype), v_BGKH.to(dtype))
    return BACKENDS[plan.backend].attend(*operands, plan, sinks_Q)


def plan_attention(backend: str, case: Case) -> Plan:
    """``backend``'s plan for ``case``; ``auto``: that of the first that fits and passes its self-test.

    Raises ValueError for an unknown backend, or one that cannot compute ``case``.
    """
    if backend == AUTO:
        return BACKENDS[_chosen(case)].prepare(case)
    reason = refusal(backend, case)
    if reason is not None:
        raise ValueError(reason)
    return BACKENDS[backend].prepare(case)


def refusal(backend: str, case: Case, tested: bool = True) -> str | None:
    """The reason why ``backend`` cannot compute ``case``, or None. ``tested``: its self-test counts too.

    Raises ValueError for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; known: {', '.join([AUTO, *BACKENDS])}")
    return BACKENDS[backend].refusal(case) or (_self_test(backend, case) if tested else None)


def _chosen(case: Case) -> str:
    for name, backend in BACKENDS.items():
        if backend.refusal(case) is None and backend.worthwhile(case):
            reason = _self_test(name, case)
            if reason is None:
                return name
            say_once(f"attention backend {name}: {reason}; another one is taken")
    return _LAST


def _self_test(name: str, case: Case) -> str | None:
    """What is wrong with the backend on this device, found out once a process."""
    if name == _LAST:
        return None
    key = (name, case.device, case.dtype, case.heads[0] // case.heads[1], case.width, case.sinks)
    if key not in _tested:
        backend = BACKENDS[name]
        _tested[key] = failure(
            lambda q, k, v, sinks, small: backend.attend(q, k, v, backend.prepare(small), sinks), case
        )
    return _tested[key]
