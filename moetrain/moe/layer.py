"""MoELayer: route, dispatch, compute, combine.

Shapes: B batch, S sequence, T = B S tokens, D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.bounds import range_refusal
from moetrain.moe.assignment import Assignment
from moetrain.moe.context import RouterContext
from moetrain.moe.dispatch import Dispatcher, LocalDispatcher, Work
from moetrain.moe.dispatch.rounds import in_rounds, round_starts
from moetrain.moe.expert_dropout import ExpertDropout, with_keys
from moetrain.moe.experts import Experts, ExpertsModule
from moetrain.moe.mlp import MLP
from moetrain.moe.options import ExpertsConfig, FirstWeights, Keep, RouterConfig
from moetrain.moe.questions import Question, Read, answers, every_pair, with_directions
from moetrain.moe.routers import build_router
from moetrain.moe.routing import Routing
from moetrain.moe.rules import (
    bias_refusal,
    block_refusal,
    dropout_refusal,
    frozen_refusal,
    outputs_refusal,
    shared_refusal,
    widths_refusal,
)
from moetrain.moe.slices import Slices
from moetrain.moe.zero_experts import ZeroExperts
from moetrain.ops.init import Normal, parameter
from moetrain.ops.uses import Use


@dataclass(frozen=True)
class Started:
    """A pass through a layer whose rows travel, for the layer's next steps. It is used once.

    ``x_BSD`` and ``x_TD``: the experts' input. ``sent``: what is dispatched of the routing. ``work``: None
    where the rows go in rounds, one after another. ``read``: what experts send back in place of their rows,
    for the router to judge; None: the rows alone.
    """

    x_BSD: Tensor
    x_TD: Tensor
    ctx: RouterContext
    routing: Routing
    sent: Assignment
    work: Work | None
    starts: list[int]
    read: Read | None


class MoELayer(nn.Module):
    """y = sum over a token's assignments of weight * expert(x), plus the shared experts of x.

    ``router`` is a key of ROUTERS; its options come as a dict or as the options dataclass. ``num_experts``
    have feed-forward networks; a router may add experts that need none. ``max_rows_per_rank``: more
    assignments than that are computed in rounds, which keep only their input for backward; None: no bound.
    ``d_ff_shared``: hidden width of all shared experts together; None: ``d_ff`` each. ``shared_gate``: their
    output is multiplied by sigmoid(x @ gate), one number a token. ``expert_widths``: the hidden width of each
    expert, where they differ; ``d_ff`` is then that of a shared expert. ``dropout``, ``input_dropout``: in
    training, of the experts' hidden units and of what each of them reads (``expert_dropout.py``).
    ``bias``: of both projections of each expert. ``frozen``: so many experts, the first ones, are not
    trained. ``experts``: what stands in the place of such networks; None: they are made.
    Raises ValueError for an unknown router, option, activation or backend.
    """

    experts: ExpertsModule

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        router: str = "topk",
        router_options: dict[str, Any] | RouterConfig | None = None,
        activation: str = "swiglu",
        backend: str = "auto",
        num_shared_experts: int = 0,
        d_ff_shared: int | None = None,
        shared_gate: bool = False,
        block: int | None = None,
        max_rows_per_rank: int | None = None,
        keep: Keep = Keep.preactivation,
        first_weights: FirstWeights = FirstWeights.model,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        expert_widths: Sequence[int] = (),
        bias: bool = False,
        frozen: int = 0,
        experts: ExpertsModule | None = None,
    ) -> None:
        super().__init__()
        given = ExpertsConfig(
            block=block, max_rows_per_rank=max_rows_per_rank, dropout=dropout, input_dropout=input_dropout
        )
        drop = ExpertDropout(input_dropout, dropout)
        shared = shared_refusal(num_shared_experts, d_ff_shared, shared_gate)
        widths = widths_refusal(expert_widths, num_experts, first_weights, drop)
        backends = block_refusal(backend, block) or dropout_refusal(backend, drop)
        biases = bias_refusal(bias, expert_widths) or frozen_refusal(frozen, num_experts, bias)
        if line := range_refusal(given, "experts") or shared or widths or backends or biases:
            raise ValueError(line)
        self.max_rows_per_rank = max_rows_per_rank
        said = {"options": router_options} if isinstance(router_options, RouterConfig) else router_options
        self.router = build_router(router, d_model=d_model, num_experts=num_experts, **(said or {}))
        if line := outputs_refusal(router, self.router.reads_outputs, expert_widths):
            raise ValueError(line)
        self.slices = Slices.of(expert_widths) if expert_widths else None
        size = (num_experts, d_model, d_ff)
        if self.slices is not None:
            size = (self.slices.total, d_model, self.slices.unit)
            frozen = sum(self.slices.per_expert[:frozen])
        if experts is None:
            experts = Experts(*size, activation, backend, keep, first_weights, drop, bias, frozen)
        self.experts = experts
        share = min(num_experts, self.router.top_k or num_experts) / num_experts
        names = ("bias_gate_up_ECF", "bias_down_ED") if bias else ()
        self.uses = {f"experts.{name}": Use(share, 0.0) for name in names}
        shared_width = num_shared_experts * d_ff if d_ff_shared is None else d_ff_shared
        self.shared = MLP(d_model, shared_width, activation) if num_shared_experts else None
        self.shared_gate_1D = parameter((1, d_model), Normal(d_model**-0.5)) if shared_gate else None
        kinds = self.router.zero_experts
        self.zero_experts = ZeroExperts(d_model, kinds) if kinds is not None else None
        self.dispatcher: Dispatcher = LocalDispatcher(block, self.experts.needs_counts)
        self.use_backend(backend)

    def use_backend(self, backend: str) -> None:
        """Compute experts, sums of rows and the router's choice by ``backend`` (``experts.backend``)."""
        self.experts.backend = self.dispatcher.backend = self.router.backend = backend

    def forward(
        self,
        x_BSD: Tensor,
        ctx: RouterContext | None = None,
        router_input: Tensor | None = None,
        shared_input: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """(y [B, S, D] in the dtype of the experts' products, the Routing).

        ``router_input`` and ``shared_input``, of x's shape, are what the router and the shared experts read;
        None: x, or what :meth:`read_by_router` says.
        Raises ValueError where ``ctx`` is of another number of tokens.
        """
        started = self.start(x_BSD, ctx, router_input)
        shared_BSD = x_BSD if shared_input is None else shared_input
        if started.work is None:
            done = self.compute(started)
            return self.finish(started, done, self.beside(started, shared_BSD))
        beside = self.beside(started, shared_BSD)  # while rows travel
        return self.finish(started, self.compute(started), beside)

    def start(
        self, x_BSD: Tensor, ctx: RouterContext | None = None, router_input: Tensor | None = None
    ) -> Started:
        """Route, and send the rows off. What is computed before :meth:`compute` overlaps with their way.

        Arguments and errors are :meth:`forward`'s.
        """
        batch, seq, width = x_BSD.shape
        if ctx is None:
            ctx = RouterContext.default(batch, seq, x_BSD.device)
        if (ctx.batch, ctx.seq) != (batch, seq):
            raise ValueError(f"ctx is of {ctx.batch} x {ctx.seq} tokens, but x has {batch} x {seq}")
        x_TD = x_BSD.reshape(-1, width)
        seen_BSD = self.read_by_router(x_BSD, ctx) if router_input is None else router_input
        question = self.router.asks(ctx)
        if question is not None:
            ctx = replace(ctx, responses_TE=self._responses(x_TD, ctx, question))
        routing: Routing = self.router(seen_BSD.flatten(0, 1), self.of_router(ctx))
        if self.router.input_scale != 1:
            x_BSD = x_BSD * self.router.input_scale
            x_TD = x_BSD.reshape(-1, width)
        if self.experts.drops:
            x_TD = with_keys(x_TD, ctx)
        sent = routing.assignment
        if self.slices is not None:
            sent = self.slices.assign(routing.assignment)
            widths_E = self.slices.widths_E(routing.num_experts, x_TD.device)
            routing = replace(routing, width_E=widths_E)
        starts = self._round_starts(sent, batch * seq)
        work = None if len(starts) > 1 else self.dispatcher.dispatch(x_TD, sent)
        read = None if question is None or not question.directions else with_directions
        return Started(x_BSD, x_TD, ctx, routing, sent, work, starts, read)

    def beside(self, started: Started, shared_BSD: Tensor) -> list[Tensor]:
        """What zero-computation experts, and shared experts of ``shared_BSD``, add to the experts' sum."""
        zero = self.zero_experts
        parts = [] if zero is None else [zero(started.x_BSD, started.routing.assignment)]
        return parts if self.shared is None else [*parts, self._shared(shared_BSD)]

    def compute(self, started: Started) -> list[Tensor]:
        """Wait for the rows, compute the experts, and send results back: :meth:`finish`'s second argument."""
        if started.work is not None:
            done: list[Tensor] = self.experts(started.work, started.read)
            return done
        compute = partial(self._one_round, read=started.read)
        return [in_rounds(started.x_TD, started.sent, started.starts, compute)]

    def finish(self, started: Started, done: list[Tensor], beside: list[Tensor]) -> tuple[Tensor, Routing]:
        """Wait for the results, and add what was computed ``beside``: (y [B, S, D], the Routing)."""
        work, routing = started.work, started.routing
        y_TD = done[0] if work is None else self.dispatcher.combine(done, work)
        if started.read is not None:
            width = started.x_BSD.shape[-1]
            y_TD, directions_TD, present_T1 = y_TD.split([width, width, 1], 1)
            routing = self.router.judged(routing, directions_TD, present_T1.squeeze(1), started.ctx)
        y_BSD = y_TD.reshape(*started.x_BSD.shape[:2], y_TD.shape[1])
        for other_BSD in beside:
            y_BSD = y_BSD + other_BSD.to(y_BSD.dtype)
        return y_BSD, routing

    def read_by_router(self, x_BSD: Tensor, ctx: RouterContext | None) -> Tensor:
        """What the router reads where nothing else is said: the layer's input, or the residual stream."""
        stream_BSD = None if ctx is None or not self.router.reads_stream else ctx.stream_BSD
        return x_BSD if stream_BSD is None else stream_BSD

    def of_router(self, ctx: RouterContext) -> RouterContext:
        """The context of its router; a layer whose router goes by the experts' weights puts them there."""
        return replace(ctx, stream_BSD=None)

    def _one_round(self, x_TD: Tensor, assignment: Assignment, read: Read | None = None) -> Tensor:
        work = self.dispatcher.dispatch(x_TD, assignment)
        return self.dispatcher.combine(self.experts(work, read), work)

    def _responses(self, x_TD: Tensor, ctx: RouterContext, question: Question) -> Tensor:
        """[T, E]: what all experts answer, in rounds that keep nothing but their input."""
        x_TD = x_TD * self.router.input_scale if self.router.input_scale != 1 else x_TD
        if self.experts.drops:
            x_TD = with_keys(x_TD, ctx)
        tokens, num_experts = x_TD.shape[0], self.experts.num_experts
        pairs = every_pair(ctx, num_experts, torch.promote_types(x_TD.dtype, torch.float32))
        starts = self._rounds(pairs, tokens, [self.max_rows_per_rank, question.rows_per_token * tokens])
        compute = partial(self._one_round, read=answers(question.response, num_experts))
        return in_rounds(x_TD, pairs, starts, compute)

    def _shared(self, x_BSD: Tensor) -> Tensor:
        assert self.shared is not None
        y_BSD: Tensor = self.shared(x_BSD)
        return (
            y_BSD if self.shared_gate_1D is None else y_BSD * F.linear(x_BSD, self.shared_gate_1D).sigmoid()
        )

    def _round_starts(self, assignment: Assignment, tokens: int) -> list[int]:
        """First tokens of the rounds, as many as the rank with the most has; one where nothing is bounded."""
        # a compiled layer cannot look at what a router chose; only an explicit bound breaks its graph
        usual = None if torch.compiler.is_compiling() else self.router.usual_rows_per_token
        if usual is not None and self.slices is not None:
            usual *= self.slices.most
        usual_rows = None if usual is None else max(1.0, usual * tokens)
        return self._rounds(assignment, tokens, [self.max_rows_per_rank, usual_rows])

    def _rounds(self, assignment: Assignment, tokens: int, bounds: list[float | None]) -> list[int]:
        """The same for the least of ``bounds`` that is one, alike in number on the ranks."""
        given = [bound for bound in bounds if bound is not None]
        if not given:
            return [0]
        starts = round_starts(assignment, tokens, min(given))
        return starts + [tokens] * (self.dispatcher.agree(len(starts)) - len(starts))
