"""Controllers: small states, updated once after each optimizer step from the batch's load or from a loss.

Shapes: L MoE layers, E experts of one layer. A layer's key is its place in the decoder; layers may have
different numbers of experts. Counts and losses are global (summed over ranks and micro-batches), so every
rank makes the same update. They are given on the host, since the step reads its metrics there in any case.
State is part of the checkpoint and no cast of the model touches it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from moetrain.moe.balance.options import Opts, read_options
from moetrain.moe.balance.terms import LossTerm
from moetrain.moe.routers import Router
from moetrain.moe.routing import RoutingRecord
from moetrain.nearest import nearest


class Controller:
    """A state that is updated after the step. A subclass defines :meth:`update` and what it needs.

    One that needs more of the tokens than their demand measures it in :meth:`measure`; the step adds up what
    that gives over micro-batches and ranks, all layers in one collective, and hands it to :meth:`follow`.
    """

    def measure(self, layer: int, record: RoutingRecord) -> Tensor | None:
        """Detached sums over the valid tokens of a micro-batch in a layer, on its device; None for nothing.

        Called once for each micro-batch of a training step, whatever is recomputed; a layer's sums have one
        shape and dtype. It must change nothing.
        """
        return None

    def follow(self, sums: Mapping[int, Tensor]) -> None:
        """Follow what :meth:`measure` gave: a layer's place -> its sum of the step. After :meth:`update`."""

    def update(self, demand: Mapping[int, Tensor], num_tokens: float, losses: Mapping[str, Tensor]) -> None:
        """Follow one step.

        ``demand``: a layer's place -> the assignments [E] that its router wanted. ``num_tokens``: the step's
        valid tokens. ``losses``: a term's key -> its values [L], of the layers in ``demand``, without
        coefficient.
        """
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The state that a checkpoint holds besides the model's buffers; a load fills it in place."""
        return {}

    def signals(self) -> dict[str, dict[int, Tensor]]:
        """Tensors that losses read in the next step as ``Seen.signals``: name -> a tensor a layer, fp32."""
        return {}

    def factors(self) -> dict[str, dict[int, float]]:
        """A loss's name -> a layer's place -> the factor of its coefficient in the next step."""
        return {}

    def metrics(self) -> dict[str, float]:
        """Name -> a figure to log after the step, as ``balance/<name>``."""
        return {}

    def messages(self) -> list[str]:
        """Lines for the user about the last step; empty if there are none."""
        return []


Terms = Sequence[LossTerm]
Build = Callable[[Opts, Mapping[int, Router]], Controller]
B = TypeVar("B", bound=Callable[..., Controller])


def never(terms: Terms) -> bool:
    return False


def anything(options: object, terms: Terms) -> None:
    pass


def any_router(router: Router) -> str | None:
    return None


@dataclass(frozen=True)
class ControllerSpec(Generic[Opts]):
    """The specification of a registered controller.

    ``build`` makes the controller from its options and each layer's router, by the layer's place. It is
    enabled where ``balance.controllers`` names it, and where ``needed`` is true of the losses. ``check``
    raises ValueError, which begins with an option's name, where the losses do not fit. ``refuses``: why a
    router cannot have it, as a phrase; None where it can. ``moves_bias``: it moves the selection bias, which
    one controller alone may do. ``what``: for tables.
    """

    name: str
    build: Build[Opts]
    options: type[Opts]
    needed: Callable[[Terms], bool]
    check: Callable[[Opts, Terms], None]
    refuses: Callable[[Router], str | None]
    moves_bias: bool
    what: str


CONTROLLERS: dict[str, ControllerSpec[Any]] = {}


def register_controller(
    name: str,
    options: type[Any],
    *,
    needed: Callable[[Terms], bool] = never,
    check: Callable[[Any, Terms], None] = anything,
    refuses: Callable[[Router], str | None] = any_router,
    moves_bias: bool = False,
    what: str = "",
) -> Callable[[B], B]:
    """Decorator of ``build(options, routers)``: make a controller known by name; see :class:`ControllerSpec`.

    Raises ValueError for a second use of a name.
    """

    def add(build: B) -> B:
        if name in CONTROLLERS and CONTROLLERS[name].build is not build:
            raise ValueError(f"controller {name!r} is registered already")
        CONTROLLERS[name] = ControllerSpec(name, build, options, needed, check, refuses, moves_bias, what)
        return build

    return add


def chosen_controllers(
    given: Mapping[str, Mapping[str, object]], terms: Terms
) -> list[tuple[ControllerSpec[Any], object]]:
    """The controllers of a config and their options: those that it names and those that its losses need.

    Raises ValueError, in one line that begins with the key below ``balance``, for what a controller refuses.
    """
    for name in given:
        if name not in CONTROLLERS:
            raise ValueError(f"controllers.{name} is not known{nearest(name, CONTROLLERS)}")
    chosen = []
    for name, spec in CONTROLLERS.items():
        if name not in given and not spec.needed(terms):
            continue
        try:
            options = read_options(spec.options, given.get(name) or {})
            spec.check(options, terms)
        except ValueError as error:
            raise ValueError(f"controllers.{name}.{error}") from None
        chosen.append((spec, options))
    movers = [spec.name for spec, _ in chosen if spec.moves_bias]
    if len(movers) > 1:
        raise ValueError(
            f"controllers: {' and '.join(movers)} would each move the selection bias: leave one of them out"
        )
    return chosen


def build_controllers(
    given: Mapping[str, Mapping[str, object]], terms: Terms, routers: Mapping[int, Router]
) -> list[Controller]:
    """The live controllers of a model with these routers, by place; none of a model without.

    Raises ValueError as :func:`chosen_controllers` does, and where two would save a tensor by one name.
    """
    chosen = chosen_controllers(given, terms)
    made = [spec.build(options, routers) for spec, options in chosen] if routers else []
    names = [name for controller in made for name in controller.tensors()]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"controllers: two of them save a tensor as {twice}")
    return made


def all_factors(controllers: Sequence[Controller]) -> dict[str, dict[int, float]]:
    """The product of all controllers' factors: a loss's name -> a layer's place -> factor."""
    product: dict[str, dict[int, float]] = {}
    for controller in controllers:
        for name, by_layer in controller.factors().items():
            before = product.setdefault(name, {})
            for layer, factor in by_layer.items():
                before[layer] = before[layer] * factor if layer in before else factor
    return product


def controller_table() -> str:
    """The table of ``docs/balance.md``: what is registered by now."""
    rows = []
    for spec in CONTROLLERS.values():
        options = ", ".join(f"`{key}` {value}" for key, value in vars(spec.options()).items()) or "-"
        rows.append(f"| `{spec.name}` | {options} | {spec.what} |")
    return "\n".join(["| controller | options | what it does |", "|---|---|---|", *rows])
