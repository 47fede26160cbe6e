"""The interface of balance losses: their input, their specification, and their registry.

Shapes: T tokens, B sequences, E experts of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, TypeVar

from torch import Tensor

from moetrain.moe.balance.options import NoOptions, Opts
from moetrain.moe.routers import Router
from moetrain.moe.routing import RoutingRecord

SCOPES = ("micro", "sequence", "global_batch", "running")


@dataclass(frozen=True)
class Seen(Generic[Opts]):
    """The input of a loss in one layer, besides the layer's record of this micro-batch.

    layer       the layer's place in the decoder.
    scope       over which tokens loads and means are taken: one of the loss's, if it has any.
    options     the loss's options, of its own class.
    num_tokens  valid tokens that the layer sees of the global batch (all ranks, all micro-batches): what the
                value is divided by.
    ahead       what the loss counts ahead, summed over the global batch; None where it counts nothing.
    signals     tensors of this layer that controllers give: name -> tensor.
    """

    layer: int
    scope: str
    options: Opts
    num_tokens: float
    ahead: Tensor | None = None
    signals: Mapping[str, Tensor] = field(default_factory=dict)

    def counted(self) -> Tensor:
        """``ahead``. Raises ValueError if it was not counted."""
        if self.ahead is None:
            raise ValueError("the global_batch scope needs the step's counts in totals")
        return self.ahead


Value = Callable[[RoutingRecord, Seen[Opts]], Tensor]
V = TypeVar("V", bound=Callable[..., Tensor])


def without_scores(router: Router) -> str | None:
    """The reason why a router can have no loss of its scores, as a phrase; None if it can."""
    return None if router.has_scores else "returns no scores"


def any_router(options: object, router: Router) -> str | None:
    return None


def without_logits(router: Router) -> str | None:
    """The reason why a router can have no loss of its logits, as a phrase; None if it can."""
    return None if router.has_logits else "returns no logits"


@dataclass(frozen=True)
class LossSpec(Generic[Opts]):
    """The specification of a registered loss.

    ``value`` gives a micro-batch's contribution, a scalar without coefficient; contributions of micro-batches
    and ranks are added up. ``scopes``: those that it offers; empty: the scope does not change it. ``ahead``:
    what is summed over the global batch, a layer, before the first backward pass, for ``global_batch`` and
    for a loss without scopes. ``refuses``: why a router cannot have it, and ``fits``: why not with these
    options. ``at_balance`` and ``what`` are for tables.
    """

    name: str
    value: Value[Opts]
    options: type[Opts]
    scopes: tuple[str, ...]
    ahead: Callable[[RoutingRecord, Opts], Tensor] | None
    refuses: Callable[[Router], str | None]
    fits: Callable[[Opts, Router], str | None]
    at_balance: str
    what: str


LOSSES: dict[str, LossSpec[Any]] = {}


def register_loss(
    name: str,
    *,
    options: type[Any] = NoOptions,
    scopes: tuple[str, ...] = (),
    ahead: Callable[[RoutingRecord, Any], Tensor] | None = None,
    refuses: Callable[[Router], str | None] = without_scores,
    fits: Callable[[Any, Router], str | None] = any_router,
    at_balance: str = "-",
    what: str = "",
) -> Callable[[V], V]:
    """Decorator of ``value(routing, seen)``: make a loss known by name; see :class:`LossSpec`.

    Raises ValueError for a second use of a name, and for a scope that is not known.
    """
    if unknown := set(scopes) - set(SCOPES):
        raise ValueError(
            f"scope={sorted(unknown)[0]!r} of loss {name!r} is not known; known: {', '.join(SCOPES)}"
        )

    def add(value: V) -> V:
        if name in LOSSES and LOSSES[name].value is not value:
            raise ValueError(f"loss {name!r} is registered already")
        LOSSES[name] = LossSpec(name, value, options, scopes, ahead, refuses, fits, at_balance, what)
        return value

    return add


def scores(routing: RoutingRecord) -> Tensor:
    """The router's scores [T, E], zero where padded. Raises ValueError for a router without scores."""
    scores_TE = routing.scores_TE
    if scores_TE is None:
        raise ValueError("this router returns no scores, so it has no balance loss: use balance=none")
    return scores_TE if routing.valid_T is None else scores_TE * routing.valid_T[:, None]


def probabilities(routing: RoutingRecord) -> Tensor:
    """p [T, E]: the scores, normalised to sum 1 a token (sigmoid scores need it), zero where padded."""
    scores_TE = scores(routing)
    return scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)


def loss_table() -> str:
    """The table of ``docs/balance.md``: what is registered by now."""
    rows = [
        f"| `{s.name}` | {', '.join(s.scopes) or '-'} | {s.at_balance} | {_defaults(s.options)} | {s.what} |"
        for s in LOSSES.values()
    ]
    return "\n".join(
        ["| loss | scopes | at perfect balance | options | what it is |", "|---|---|---|---|---|", *rows]
    )


def _defaults(options: type[Any]) -> str:
    shown = {k: v.name if isinstance(v, Enum) else v for k, v in vars(options()).items()}
    return ", ".join(f"`{key}` {value}" for key, value in shown.items()) or "-"
