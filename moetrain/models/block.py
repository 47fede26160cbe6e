"""The blocks of a decoder, by ``model.wiring``: attention, and a feed-forward layer that is dense or MoE.

A block returns the stream, what its layer tells, and what later blocks read besides the stream. It is the
unit that is sharded, recomputed and compiled, so nothing else passes between blocks.

Shapes: B batch, S sequence, D model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from moetrain.models.attention import build_attention
from moetrain.models.cache import LayerCache
from moetrain.models.feed_forward import build_feed_forward
from moetrain.models.momentum import State, advance, read_at
from moetrain.models.norm import RMSNorm
from moetrain.models.options import ModelConfig, is_moe_layer, moe_layers
from moetrain.models.rope import Rope
from moetrain.models.wiring_options import RouterInput, ShortcutFrom, Wiring
from moetrain.moe import MoELayer, RouterContext, RoutingRecord
from moetrain.moe.mlp import MLP
from moetrain.moe.options import ExpertsConfig, RouterConfig
from moetrain.ops.attention import Plan
from moetrain.ops.fork import fork
from moetrain.ops.init import Constant, Normal, parameter
from moetrain.ops.linear import wide_linear


class Carried(NamedTuple):
    """What blocks hand on besides the stream, where the config asks for it; a pytree, as FSDP2 wants.

    attended_BSD  the previous block's stream after its attention (``shortcut_from=previous_attention``).
    read_BSD      what the previous MoE layer read (``router_input=previous_moe``).
    momentum      of ``wiring=momentum``.
    """

    attended_BSD: Tensor | None = None
    read_BSD: Tensor | None = None
    momentum: State | None = None


class BlockOutput(NamedTuple):
    """``record``: what the block's layer tells of itself, or None."""

    x_BSD: Tensor
    record: RoutingRecord | None
    carried: Carried


def build_block(cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> Block:
    """Block ``layer`` (from 0). A block whose layer is dense is plain, whatever the wiring."""
    kinds = {Wiring.residual: ResidualBlock, Wiring.momentum: MomentumBlock, Wiring.shortcut: ShortcutBlock}
    kind = kinds.get(cfg.wiring, Block) if is_moe_layer(cfg, layer) else Block
    return kind(cfg, router, experts, layer)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    ``model.sandwich_norms``: x + norm(attention(norm(x))) and likewise (Ding et al. 2021, arXiv:2105.13290).
    """

    def __init__(self, cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> None:
        super().__init__()
        self.residual_scale = cfg.scales.residual
        self.attention_norm = RMSNorm(cfg.d_model, cfg.norm_eps, cfg.zero_centered_norms)
        self.attention = build_attention(cfg, layer)
        self.feed_forward_norm = RMSNorm(cfg.d_model, cfg.norm_eps, cfg.zero_centered_norms)
        self.attention_out_norm, self.feed_forward_out_norm = (
            RMSNorm(cfg.d_model, cfg.norm_eps, cfg.zero_centered_norms) if cfg.sandwich_norms else None
            for _ in range(2)
        )
        is_moe = is_moe_layer(cfg, layer)
        self.feed_forward = build_feed_forward(
            cfg.feed_forward if is_moe else "dense", cfg, router, experts, layer
        )
        self.router_input = cfg.router_input if is_moe else RouterInput.own
        from_attended = cfg.shortcut_from is ShortcutFrom.previous_attention
        self.hands_on_attended = cfg.wiring is Wiring.shortcut and from_attended

    def forward(
        self,
        x_BSD: Tensor,
        rope: Rope,
        plan: Plan,
        ctx: RouterContext | None = None,
        cache_layer: LayerCache | None = None,
        carried: Carried = Carried(),  # noqa: B008 - immutable
    ) -> BlockOutput:
        before_BSD = x_BSD
        attended_BSD = self.attention(self.attention_norm(x_BSD), rope, plan, cache_layer)
        x_BSD = x_BSD + self._added(attended_BSD, self.attention_out_norm)
        if self.hands_on_attended:
            carried = carried._replace(attended_BSD=x_BSD)
        stream_BSD = self._read_at(x_BSD, carried)
        ctx = _on_stream(ctx, stream_BSD)
        read_BSD = self.feed_forward_norm(stream_BSD)
        seen_BSD = None
        if self.router_input is RouterInput.pre_attention:
            seen_BSD = before_BSD
        elif self.router_input is RouterInput.previous_moe:
            seen_BSD, carried = carried.read_BSD, carried._replace(read_BSD=read_BSD)
        y_BSD, record = self._feed(read_BSD, ctx, seen_BSD)
        return self._add(x_BSD, y_BSD, record, carried)

    def _read_at(self, x_BSD: Tensor, carried: Carried) -> Tensor:
        """Where the feed-forward layer reads the stream."""
        return x_BSD

    def _feed(
        self, x_BSD: Tensor, ctx: RouterContext | None, seen_BSD: Tensor | None
    ) -> tuple[Tensor, RoutingRecord | None]:
        """The feed-forward layer's output, and its record; its router reads ``seen_BSD``, or None: x."""
        if seen_BSD is None:
            y_BSD, record = self.feed_forward(x_BSD, ctx)
        else:
            y_BSD, record = self.feed_forward(x_BSD, ctx, router_input=seen_BSD)
        return y_BSD, record

    def _add(
        self, x_BSD: Tensor, y_BSD: Tensor, record: RoutingRecord | None, carried: Carried
    ) -> BlockOutput:
        return BlockOutput(x_BSD + self._added(y_BSD, self.feed_forward_out_norm), record, carried)

    def _added(self, y_BSD: Tensor, norm: RMSNorm | None) -> Tensor:
        """What joins the stream of a half's output."""
        return times(y_BSD if norm is None else norm(y_BSD), self.residual_scale)


class ResidualBlock(Block):
    """y = c_0 MoE(x) + c_1 MLP(x), with c = softmax(W x + b) of two elements a token.

    The dense network computes while rows travel. As the released layer has it (DeepSpeed,
    ``deepspeed/moe/layer.py``), which makes the network as wide as an expert: here it is ``model.d_ff``.
    The coefficients are computed in fp32 at least.
    """

    def __init__(self, cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> None:
        super().__init__(cfg, router, experts, layer)
        self.dense = MLP(cfg.d_model, cfg.d_ff, experts.activation.value)
        self.w_mix_2D = parameter((2, cfg.d_model), Normal(cfg.init_std))
        self.b_mix_2 = parameter((2,), Constant(0.0))

    def _feed(
        self, x_BSD: Tensor, ctx: RouterContext | None, seen_BSD: Tensor | None
    ) -> tuple[Tensor, RoutingRecord | None]:
        moe = _steps(self.feed_forward)
        started = moe.start(x_BSD, ctx, seen_BSD)
        dense_BSD = self.dense(x_BSD)
        logits_BS2 = wide_linear(x_BSD, self.w_mix_2D)
        c_BS2 = (logits_BS2 + self.b_mix_2.to(logits_BS2.dtype)).softmax(-1).to(dense_BSD.dtype)
        y_BSD, routing = moe.finish(started, moe.compute(started), moe.beside(started, x_BSD))
        return c_BS2[..., :1] * y_BSD + c_BS2[..., 1:] * dense_BSD, routing


class MomentumBlock(Block):
    """Attention as ever; the MoE layer's output enters a momentum over depth (``momentum.py``)."""

    def __init__(self, cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> None:
        super().__init__(cfg, router, experts, layer)
        self.momentum, self.place = cfg.momentum, moe_layers(cfg).index(layer)

    def _read_at(self, x_BSD: Tensor, carried: Carried) -> Tensor:
        return read_at(self.momentum, x_BSD, carried.momentum)

    def _add(
        self, x_BSD: Tensor, y_BSD: Tensor, record: RoutingRecord | None, carried: Carried
    ) -> BlockOutput:
        x_BSD, state = advance(self.momentum, x_BSD, y_BSD, carried.momentum, self.place)
        return BlockOutput(x_BSD, record, carried._replace(momentum=state))


class ShortcutBlock(Block):
    """x' = x + attention(norm(x)); x' + experts(norm(s)) + shared(norm(x')), s a stream from before.

    The router and the routed experts read s: ``model.shortcut_from``. Rows are sent before attention and
    waited for after it; results travel while the shared experts compute. In the backward pass it is the same
    the other way round. ``overlapped`` False: one after the other, to the same bits.

    Written from the paper's equations as restated elsewhere; the code was not read. There the rows of
    ``previous_attention`` leave during the block before, and travel during its dense layer too.
    """

    overlapped = True

    def __init__(self, cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> None:
        super().__init__(cfg, router, experts, layer)
        self.shortcut_norm = RMSNorm(cfg.d_model, cfg.norm_eps, cfg.zero_centered_norms)

    def forward(
        self,
        x_BSD: Tensor,
        rope: Rope,
        plan: Plan,
        ctx: RouterContext | None = None,
        cache_layer: LayerCache | None = None,
        carried: Carried = Carried(),  # noqa: B008 - immutable
    ) -> BlockOutput:
        moe = _steps(self.feed_forward)
        s_BSD = carried.attended_BSD if self.hands_on_attended else None
        if s_BSD is None:
            s_BSD, x_BSD = fork(x_BSD)
        ctx = _on_stream(ctx, s_BSD)
        started = moe.start(self.shortcut_norm(s_BSD), ctx) if self.overlapped else None
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rope, plan, cache_layer)
        if started is None:
            started = moe.start(self.shortcut_norm(s_BSD), ctx)
        if self.hands_on_attended:
            carried = carried._replace(attended_BSD=x_BSD)
        done = moe.compute(started)
        beside = moe.beside(started, self.feed_forward_norm(x_BSD))  # while results travel
        y_BSD, routing = moe.finish(started, done, beside)
        return BlockOutput(x_BSD + y_BSD, routing, carried)


def times(x: Tensor, factor: float) -> Tensor:
    """``x`` itself where the factor is 1."""
    return x if factor == 1 else x * factor


def _on_stream(ctx: RouterContext | None, stream_BSD: Tensor) -> RouterContext | None:
    """With what the layer's norm reads, for routers that look at that."""
    return None if ctx is None else replace(ctx, stream_BSD=stream_BSD)


def _steps(layer: nn.Module) -> MoELayer:
    """The layer whose steps a block takes one by one (``check_wiring`` has refused others)."""
    assert isinstance(layer, MoELayer)
    return layer
