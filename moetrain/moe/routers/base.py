"""The interface of routers: the base class, the registry, and :func:`build_router`.

Shapes: T tokens, D model, E experts.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from moetrain.bounds import range_refusal
from moetrain.moe.assign import apply_capacity
from moetrain.moe.context import RouterContext
from moetrain.moe.load_bound import bound_load
from moetrain.moe.local_experts import local_experts, local_refusal
from moetrain.moe.options import DropOrder, Repair, Rounding, RouterConfig
from moetrain.moe.permutation import Permutation, mix, rename
from moetrain.moe.questions import Asking
from moetrain.moe.repair import repair_overflow
from moetrain.moe.routers.checks import check_capacity, check_permutation, check_scores
from moetrain.moe.routing import Routing
from moetrain.moe.token_rounding import round_tokens
from moetrain.moe.zero_experts import ZeroKinds
from moetrain.ops.init import Initializer, Normal, drop_overwritten_initializers, in_memory, parameter
from moetrain.ops.kernel_or_torch import AUTO
from moetrain.ops.linear import wide_linear


class Router(Asking, nn.Module):
    """Maps tokens to a Routing. A subclass defines ``route``; an order of experts that is searched for,
    capacity, repair or rounding change its result.

    The attributes below describe the router to the trainer, the rules of the config and reports, which ask
    nothing else. ``moetrain router check`` compares them with the router's Routings.

    ``bias_E`` is added to the scores for selection only (Wang et al. 2024, "Auxiliary-loss-free load
    balancing"); a controller moves it, autograd never does. It stays fp32 through every cast.
    """

    is_router = True  # its parameters form an FSDP group of their own, in fp32
    keeps_own_init = True  # whatever the model around it says of initial values
    zero_experts: ZeroKinds | None = None  # experts without a network, after the others; part of num_experts
    reads_stream = False  # whether it reads the residual stream before the layer's norm, where there is one
    input_scale = 1.0  # multiplies what all experts but the shared ones read
    usual_rows_per_token: float | None = None  # above it, memory is bounded by computing in rounds
    top_k: int | None = None  # the most experts of a token; None: it may take all of them
    target_k: int | None = None  # the mean number a token that the controller sparsity aims at; None: none
    capacity_of_tokens = False  # whether a capacity factor multiplies a group's tokens, not its assignments
    causal = True  # in training, a token's routing is free of later tokens and of other sequences
    reads_bias = False  # whether bias_E takes part in the selection, for the controller bias
    # a token takes its top_k best of scores_TE (in [0, 1]) plus bias_E, as the controller quantile needs
    takes_best = False
    replays = False  # whether it takes the experts of ctx.forced_TK where there are some: routing replay
    has_scores = True  # whether its Routings carry scores_TE, for balance losses, repair and metrics
    has_logits = True  # likewise logits_TE
    freezes = False  # whether ``frozen`` ever names a parameter
    has_penalty = False  # likewise penalty, what the router charges itself
    has_choices = False  # likewise choices_TE, choices with a gradient
    task: str | None = None  # the train.task by which its paper trains it; None: any
    permutable = True  # whether its experts may be put in another order after it has chosen
    backend = AUTO  # experts.backend of its layer: whether a kernel may choose
    eval_modes: tuple[str, ...] = ()  # ways to route in evaluation, the default first; empty: one way
    bias_E: Tensor
    _fp32_buffers: tuple[str, ...] = ("bias_E",)

    def __init__(self, d_model: int, num_experts: int, options: RouterConfig) -> None:
        super().__init__()
        if line := range_refusal(options, "router"):
            raise ValueError(line)
        check_capacity(options)
        self.d_model, self.num_experts, self.options = d_model, num_experts, options
        self.eval_mode = self.eval_modes[0] if self.eval_modes else ""
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))
        self.order_EE: nn.Parameter | None = None
        if options.permutation_steps is not None:
            self.order_EE = parameter((num_experts, num_experts), Normal(0.05 * 3**-0.5))
            # a bias and forced choices are of the router's outputs; loads and records are of experts
            self.has_penalty, self.reads_bias, self.takes_best, self.replays = True, False, False, False
            self._permutation = Permutation(options.permutation_steps)

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        """The routing before any capacity."""
        raise NotImplementedError

    def rows_ED(self) -> Tensor | None:
        """The vector of each expert that the router compares tokens with, of any width; None: it has none."""
        return None

    def products_per_token(self) -> int:
        """Multiply-adds of matrix products for each token, by which FLOPs are counted."""
        return sum(p.numel() for p in self.parameters())

    def frozen(self, step: int) -> tuple[nn.Parameter, ...]:
        """The parameters that step number ``step`` leaves as they are, without a gradient or a decay.

        A function of the step alone, so that every rank says the same. What no step ever moves says so by
        ``requires_grad`` instead.
        """
        return ()

    def after_step(self, stats: Tensor) -> None:
        """Update the router's state after an optimizer step.

        ``stats``: the sum of the Routings' ``stats`` over ranks and micro-batches, the same on every rank.
        Called once a step, if the Routings have any. A router may change its state nowhere else.
        """

    def forward(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            routing = replace(self.route(x_TD, ctx), domain_ids_T=ctx.domain_ids_T)
            routing = self._in_order(routing, ctx)
            options = self.options
            if self.training and options.rounding is not Rounding.none:
                total = options.combine(self.num_experts).total
                how = (options.rounding, options.rounding_tile, options.group, total)
                return round_tokens(routing, ctx, *how)
            if self.training and options.max_overload is not None:
                return bound_load(routing, ctx, options.max_overload, options.group)
            factor = self.capacity_factor()
            if factor is None:
                return routing
            order = options.drop_order
            if order is DropOrder.random and not self.training:
                order = DropOrder.position  # evaluation draws nothing
            limits = (factor, options.min_capacity, order, options.group)
            of_tokens = self.capacity_of_tokens
            kept = apply_capacity(routing, ctx, *limits, of_tokens=of_tokens)
            if options.repair is Repair.none:
                return kept
            local_TE = self._local_experts(ctx) if options.repair.is_local else None
            return repair_overflow(routing, kept, ctx, options.repair, *limits, local_TE, of_tokens=of_tokens)

    def _in_order(self, routing: Routing, ctx: RouterContext) -> Routing:
        """``routing`` with its experts in the order that is searched for, if there is one."""
        steps = self.options.permutation_steps
        if self.order_EE is None or steps is None:
            return routing
        if self.training and ctx.step < steps:
            return mix(routing, ctx, self.order_EE, steps, self.options.permutation_entropy_coef)
        return rename(routing, self.order_EE, self._permutation)

    def capacity_factor(self) -> float | None:
        """The factor that multiplies an expert's even share of the assignments, or of the tokens where
        ``capacity_of_tokens``; None: no capacity."""
        options = self.options
        return options.capacity_factor if self.training else options.eval_capacity_factor

    def _local_experts(self, ctx: RouterContext) -> Tensor:
        """[T, E]: whether an expert lies on the token's own device. Experts without a network lie on all."""
        devices, sequences = self.options.local_devices, self.options.local_sequences
        assert devices is not None
        assert sequences is not None
        extra = 0 if self.zero_experts is None else self.zero_experts.total
        return local_experts(ctx, self.num_experts - extra, extra, devices, sequences)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        kept = {name: self._buffers[name] for name in self._fp32_buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if before is None or after is None or after.dtype == before.dtype:
                continue
            fresh = torch.zeros_like(after, dtype=before.dtype) if before.is_meta else before.to(after.device)
            self._buffers[name] = fresh
        return self


def resolve_top_k(top_k: int | None, num_experts: int) -> int:
    """``top_k``, or 2 where it is None (1 where there is one expert). ValueError outside 1 to E."""
    top_k = min(2, num_experts) if top_k is None else top_k
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"router.top_k={top_k} must lie between 1 and num_experts={num_experts}: "
            "lower router.top_k or raise num_experts"
        )
    return top_k


class LinearRouter(Router):
    """A router whose logits are one linear map of the token, computed in fp32 at least."""

    def __init__(self, d_model: int, num_experts: int, options: RouterConfig) -> None:
        super().__init__(d_model, num_experts, options)
        self.weight_ED = parameter((num_experts, d_model), self.first_weights(d_model))

    @staticmethod
    def first_weights(d_model: int) -> Initializer:
        return Normal(d_model**-0.5 * 0.5)

    def rows_ED(self) -> Tensor | None:
        return self.weight_ED

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, E]."""
        return wide_linear(x_TD, self.weight_ED)


@dataclass(frozen=True)
class RouterSpec:
    """The specification of a registered router.

    ``paper`` names its source; ``returns`` describes its assignment in a few words.
    """

    name: str
    cls: type[Router]
    options: type[RouterConfig]
    paper: str = ""
    returns: str = ""

    @property
    def exported(self) -> bool:
        """Whether the options' own class says in ``evaluation_rule`` what the router does in evaluation."""
        return "evaluation_rule" in vars(self.options)


ROUTERS: dict[str, RouterSpec] = {}
R = TypeVar("R", bound=type[Router])


def register(name: str, options: type[RouterConfig], paper: str = "", returns: str = "") -> Callable[[R], R]:
    """Class decorator: make a router known as ``router=name``. A second use of a name is an error."""

    def add(cls: R) -> R:
        if name in ROUTERS and ROUTERS[name].cls is not cls:
            raise ValueError(f"router {name!r} is registered already, by {ROUTERS[name].cls.__qualname__}")
        ROUTERS[name] = RouterSpec(name, cls, options, paper, returns)
        return cls

    return add


def build_router(
    name: str, *, d_model: int, num_experts: int, options: RouterConfig | None = None, **overrides: Any
) -> Router:
    """A router by name; enum options may be given as strings. Works without options for any E >= 1.

    Raises ValueError for an unknown name or option, with the nearest known one.
    """
    spec = _spec(name)
    if num_experts < 1 or d_model < 1:
        raise ValueError(f"num_experts={num_experts} and d_model={d_model} must be at least 1")
    if options is None:
        options = spec.options(name=name)
    options = _with_overrides(options, overrides)
    if not spec.cls.has_scores:
        check_scores(name, options)
    if not spec.cls.permutable:
        check_permutation(name, options)
    if line := local_refusal(options, num_experts):
        raise ValueError(line)
    with in_memory():  # routers are small, and one of a plugin may draw its weights as it likes
        router: Router = spec.cls(d_model, num_experts, options)
    drop_overwritten_initializers(router)
    return router


def _spec(name: str) -> RouterSpec:
    if name not in ROUTERS:
        raise ValueError(f"unknown router {name!r}; {_nearest(name, ROUTERS)}")
    return ROUTERS[name]


def full_options(options: RouterConfig) -> RouterConfig:
    """The router's own options; if ``options`` has the common fields only, the others take their defaults."""
    if type(options) is not RouterConfig:
        return options
    return _spec(options.name).options(**{f.name: getattr(options, f.name) for f in fields(options)})


def _with_overrides(options: RouterConfig, overrides: dict[str, Any]) -> RouterConfig:
    hints = get_type_hints(type(options))
    known = [f.name for f in fields(options)]
    values = {}
    for key, value in overrides.items():
        if key not in known:
            raise ValueError(f"router {options.name!r} has no option {key!r}; {_nearest(key, known)}")
        values[key] = _to_enum(hints[key], key, value)
    return replace(options, **values)


def _to_enum(hint: Any, key: str, value: Any) -> Any:
    kinds = get_args(hint) if get_origin(hint) is Union else (hint,)
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(value, str):
            if value not in kind.__members__:
                raise ValueError(f"{key}={value!r}; {_nearest(value, kind.__members__)}")
            return kind[value]
    return value


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
