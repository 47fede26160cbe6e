"""Layers whose experts' weights are averaged before they are used: ``smear`` and ``meo``.

smear  one gate a segment, all matrices of a network merged by it, one network run (Muqeeth et al. 2023,
       arXiv:2306.03745).
meo    each matrix has a gate of its own, over the mean of its own input, and k experts in it (He et al. 2023,
       arXiv:2310.09832). For one matrix the merged output is the experts' weighted sum; for the layer it is
       not, since a nonlinearity stands between.

Routing by a whole sequence, as both papers do, looks at later tokens, and is refused in a decoder;
``previous_segment`` is the causal form (``moe/segments.py`` says whose).

Shapes: B batch, S sequence, T = B S tokens, D model, F hidden, E experts, X = B G segments, L tokens of one,
C columns (2 with a gate, else 1), I and O the input and output width of a matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.models.feed_forward import WithoutDispatch, register_feed_forward
from moetrain.models.layer_options import MergingConfig, RouteBy
from moetrain.models.layers.common import context_of, refuse_unread
from moetrain.models.options import ModelConfig
from moetrain.moe import RouterContext
from moetrain.moe.assign import tokens_per_sequence
from moetrain.moe.merging_gates import MergeRecord, NoisyGate, SmearGate
from moetrain.moe.options import ExpertsConfig, RouterConfig
from moetrain.moe.segments import Segments, routing_states
from moetrain.ops.activations import activate, is_gated
from moetrain.ops.init import Constant, Normal, parameter
from moetrain.ops.uses import Use

_SALT = 0x3E60


class Stacks(nn.Module):
    """The experts' matrices, each stacked [E, O, I]. A token passes through one merged network, and a segment
    of ``length`` tokens through one merging of all."""

    def __init__(self, shapes: dict[str, tuple[int, int]], num_experts: int, length: int | None) -> None:
        super().__init__()
        self.uses: dict[str, Use] = {}
        for name, (outputs, inputs) in shapes.items():
            made = parameter((num_experts, outputs, inputs), Normal(inputs**-0.5))
            self.register_parameter(name, made)
            self.uses[name] = Use(1 / num_experts, 1 / num_experts + (1 / length if length else 0))

    def merged(self, name: str, gates_XE: Tensor) -> Tensor:
        """[X, O, I]."""
        stack_EOI: Tensor = getattr(self, name)
        return torch.einsum("xe,eoi->xoi", gates_XE.to(stack_EOI.dtype), stack_EOI)


class Merging(WithoutDispatch):
    """What both layers share; ``options.route_by`` says what a segment is and what routes it."""

    def __init__(
        self, d_model: int, d_ff: int, num_experts: int, options: MergingConfig, activation: str
    ) -> None:
        super().__init__()
        self.activation, self.num_experts = activation, num_experts
        by_row = options.route_by is RouteBy.sequence
        self.length = None if by_row else options.segment
        ups = ("w_gate_EFD", "w_up_EFD") if is_gated(activation) else ("w_up_EFD",)
        self.shapes = dict.fromkeys(ups, (d_ff, d_model)) | {"w_down_EDF": (d_model, d_ff)}
        self.experts = Stacks(self.shapes, num_experts, self.length)

    def segments(self, ctx: RouterContext) -> Segments:
        return Segments(ctx.batch, ctx.seq, self.length, ctx.seen)

    def noise(self, ctx: RouterContext, segments: Segments, matrix: int) -> Tensor:
        """[X, E], uniform: that of each segment's first token."""
        drawn_TE = ctx.uniform((ctx.batch * ctx.seq, self.num_experts), _SALT + matrix)
        return segments.first_tokens(drawn_TE)

    def per_segment(self, *names: str) -> dict[str, Use]:
        """Parameters that a segment uses once."""
        return {name: Use(1.0, 1 / self.length if self.length else 0.0) for name in names}

    def hidden(self, ups_XLF: list[Tensor]) -> Tensor:
        return activate(ups_XLF[0] if len(ups_XLF) > 1 else None, ups_XLF[-1], self.activation)


class Smear(Merging):
    """One merged network a segment."""

    def __init__(
        self, d_model: int, d_ff: int, num_experts: int, options: MergingConfig, activation: str
    ) -> None:
        super().__init__(d_model, d_ff, num_experts, options, activation)
        self.router = SmearGate(d_model, num_experts, options.expert_dropout)
        self.uses = self.per_segment("router.weight_ED")

    def forward(self, x_BSD: Tensor, ctx: RouterContext | None = None) -> tuple[Tensor, MergeRecord]:
        ctx = context_of(x_BSD, ctx)
        segments = self.segments(ctx)
        drops = self.training and self.router.dropout > 0
        noise_XE = self.noise(ctx, segments, 0) if drops else None
        gates_XE = self.router(routing_states(x_BSD, segments, ctx, "x"), noise_XE)
        *ups, down = (self.experts.merged(name, gates_XE) for name in self.shapes)
        x_XLD = segments.cut(x_BSD)
        y_XLD = self.hidden([x_XLD @ up.mT for up in ups]) @ down.mT
        return segments.joined(y_XLD), _record(segments.spread(gates_XE), ctx)


class TokenBlock(nn.Module):
    """x + up(relu(down(x))), a bottleneck; ``up`` starts from zero, so that at first it is x."""

    keeps_own_init = True

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w_in = parameter((inner, width), Normal((3 * width) ** -0.5))
        self.b_in = parameter((inner,), Constant(0.0))
        self.w_back = parameter((width, inner), Constant(0.0))
        self.b_back = parameter((width,), Constant(0.0))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(F.linear(x, self.w_in, self.b_in))
        return x + F.linear(inner, self.w_back, self.b_back)


class MEO(Merging):
    """One merged matrix a segment in each place of a network."""

    def __init__(
        self, d_model: int, d_ff: int, num_experts: int, options: MergingConfig, activation: str
    ) -> None:
        super().__init__(d_model, d_ff, num_experts, options, activation)
        columns = len(self.shapes) * num_experts
        inputs = [width for _, width in self.shapes.values()]
        self.router = nn.ModuleList(NoisyGate(width, num_experts, options.top_k, columns) for width in inputs)
        places = range(len(inputs))
        self.uses = self.per_segment(
            *(f"router.{place}.{name}" for place in places for name in ("weight_ED", "noise_ED"))
        )
        self.token_blocks: nn.ModuleList | None = None
        if options.token_reduction is not None:
            inner = [max(1, width // options.token_reduction) for width in inputs]
            self.token_blocks = nn.ModuleList(map(TokenBlock, inputs, inner))

    def forward(self, x_BSD: Tensor, ctx: RouterContext | None = None) -> tuple[Tensor, MergeRecord]:
        ctx = context_of(x_BSD, ctx)
        segments, gates, loads = self.segments(ctx), [], []

        def merged(matrix: int, input_BSI: Tensor) -> Tensor:
            name = list(self.shapes)[matrix]
            if self.token_blocks is not None:
                input_BSI = self.token_blocks[matrix](input_BSI)
            noise_XE = self.noise(ctx, segments, matrix) if self.training else None
            gates_XE, load_XE = self.router[matrix](routing_states(input_BSI, segments, ctx, name), noise_XE)
            gates.append(gates_XE)
            loads.append(load_XE)
            return segments.joined(segments.cut(input_BSI) @ self.experts.merged(name, gates_XE).mT)

        last = len(self.shapes) - 1
        hidden_BSF = self.hidden([merged(matrix, x_BSD) for matrix in range(last)])
        y_BSD = merged(last, hidden_BSF)
        load_TE = None if loads[0] is None else segments.spread(torch.cat(loads, 1))
        return y_BSD, _record(segments.spread(torch.cat(gates, 1)), ctx, load_TE)


def _record(gates_TE: Tensor, ctx: RouterContext, load_TE: Tensor | None = None) -> MergeRecord:
    used_TE = gates_TE.detach() > 0
    if ctx.valid_T is not None:
        used_TE = used_TE & ctx.valid_T[:, None]
    return MergeRecord(
        num_tokens_B=tokens_per_sequence(ctx),
        demand_BE=used_TE.unflatten(0, (ctx.batch, ctx.seq)).sum(1),
        scores_TE=gates_TE,
        valid_T=ctx.valid_T,
        load_TE=load_TE,
    )


def _causal(cfg: ModelConfig, experts: ExpertsConfig) -> None:
    refuse_unread(cfg, experts)
    if cfg.merging.route_by is RouteBy.sequence:
        raise ValueError(
            "model.merging.route_by=sequence lets every token see later ones, and the decoder is causal: "
            "set model.merging.route_by=previous_segment"
        )


@register_feed_forward("smear", on_meta=True, alike=True)
def _smear(cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> nn.Module:
    _causal(cfg, experts)
    return Smear(cfg.d_model, cfg.d_ff_expert, cfg.num_experts, cfg.merging, experts.activation.value)


@register_feed_forward("meo", on_meta=True, alike=True)
def _meo(cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> nn.Module:
    _causal(cfg, experts)
    return MEO(cfg.d_model, cfg.d_ff_expert, cfg.num_experts, cfg.merging, experts.activation.value)
