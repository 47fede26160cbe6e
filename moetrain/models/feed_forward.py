"""The feed-forward half of a block: a registry of modules ``forward(x_BSD, ctx) -> (y_BSD, record or None)``.

Shapes: B batch, S sequence, D model. A record is what the layer tells of itself: the record of the first
router in it, or None; which of the two is the same in every pass and on every rank. Losses, controllers and
metrics see what is told, and that router's state follows it.
``model.feed_forward`` names the builder of the MoE layers; ``dense`` builds the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from moetrain.models.biased_mlp import BiasedFeedForward
from moetrain.models.options import ModelConfig, experts_of, width_of
from moetrain.models.wiring_options import Wiring
from moetrain.moe import MoELayer, RouterContext, RoutingRecord
from moetrain.moe.adapters import AdapterLayer
from moetrain.moe.low_rank_experts import LowRankLayer
from moetrain.moe.mlp import MLP
from moetrain.moe.options import ExpertKind, ExpertsConfig, FirstWeights, RouterConfig
from moetrain.moe.routers import full_options
from moetrain.moe.rules import low_rank_refusal
from moetrain.ops.init import with_own_values

Builder = Callable[[ModelConfig, RouterConfig, ExpertsConfig, int], nn.Module]  # the last: its layer's place
FEED_FORWARDS: dict[str, Builder] = {}
_ON_META: set[Builder] = set()
ALIKE: set[str] = set()  # the layers that do not go by their place: a smaller model of them may have fewer


def register_feed_forward(
    name: str, on_meta: bool = False, alike: bool = False
) -> Callable[[Builder], Builder]:
    """Decorator: make a builder ``(cfg, router, experts, layer)`` known by name, ``layer`` its place from 0.

    A second use of a name is an error. What the builder refuses it says by ValueError, in one line.

    A layer's initial values are its own: what it makes or writes itself (``nn.Linear``, ``nn.init``) is
    drawn whole on every rank, from torch's generator. ``on_meta``: all its parameters come from
    :func:`~moetrain.ops.init.parameter`, and nothing is written into them or computed from them before
    training. Then each rank allocates its shards alone, and the model's config says how they start.
    ``alike``: its layers are the same whatever their place.
    """

    def add(builder: Builder) -> Builder:
        if FEED_FORWARDS.setdefault(name, builder) is not builder:
            raise ValueError(f"feed-forward {name!r} is registered already")
        if on_meta:
            _ON_META.add(builder)
        if alike:
            ALIKE.add(name)
        return builder

    return add


def build_feed_forward(
    name: str, cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int
) -> nn.Module:
    """Raises ValueError for an unknown name."""
    if name not in FEED_FORWARDS:
        raise ValueError(f"unknown feed-forward {name!r}; known: {', '.join(sorted(FEED_FORWARDS))}")
    builder = FEED_FORWARDS[name]
    if builder in _ON_META:
        return builder(cfg, router, experts, layer)
    return with_own_values(lambda: builder(cfg, router, experts, layer))


class WithoutDispatch(nn.Module):
    """A feed-forward layer whose experts, if it has any, are never dispatched over ranks.

    ``refuses_ep`` says why its experts do not lie on ranks of their own; any layer may have it. ``tells``:
    whether it returns a record; without one no balance loss or controller can follow it.
    """

    refuses_ep = "dispatches no tokens"
    tells = True


class DenseFeedForward(MLP):
    """A plain feed-forward network behind the seam; it has nothing to record."""

    def forward(  # type: ignore[override]
        self, x_BSD: Tensor, ctx: RouterContext | None = None
    ) -> tuple[Tensor, RoutingRecord | None]:
        return super().forward(x_BSD), None


@register_feed_forward("dense", on_meta=True, alike=True)
def _dense(cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> nn.Module:
    if cfg.mlp_bias:
        return BiasedFeedForward(cfg.d_model, cfg.d_ff, experts.activation.value)
    return DenseFeedForward(cfg.d_model, cfg.d_ff, experts.activation.value)


def layer_options(
    cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int
) -> dict[str, Any]:
    """What every kind of MoELayer takes of the config."""
    return {
        "d_model": cfg.d_model,
        "num_experts": experts_of(cfg, layer),
        "router": router.name,
        "router_options": full_options(router),
        "activation": experts.activation.value,
        "backend": experts.backend.value,
        "keep": experts.keep,
        "dropout": experts.dropout,
        "input_dropout": experts.input_dropout,
        "frozen": experts.frozen,
        "num_shared_experts": cfg.num_shared_experts,
        "d_ff_shared": cfg.shared_width if cfg.layer_widths and cfg.num_shared_experts else cfg.d_ff_shared,
        "shared_gate": cfg.shared_gate,
        "block": experts.block,
        "max_rows_per_rank": experts.max_rows_per_rank,
        "bias": experts.bias,
    }


@register_feed_forward("moe", on_meta=True, alike=True)
def _moe(cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> nn.Module:
    common, width = layer_options(cfg, router, experts, layer), width_of(cfg, layer)
    if experts.kind is ExpertKind.networks:
        first = experts.first_weights
        return MoELayer(d_ff=width, first_weights=first, expert_widths=cfg.expert_widths, **common)
    if line := _kind_refusal(cfg, experts):
        raise ValueError(line)
    if experts.kind is ExpertKind.adapters:
        return AdapterLayer(d_ff=cfg.d_ff, d_adapter=width, **common)
    return LowRankLayer(d_ff=width, **common)


def _kind_refusal(cfg: ModelConfig, experts: ExpertsConfig) -> str | None:
    """Why experts around one network cannot have these settings; None where they can."""
    kind = f"experts.kind={experts.kind.name}"
    if experts.first_weights is not FirstWeights.model:
        return (
            f"experts.first_weights={experts.first_weights.name} is of networks, not of {kind}: "
            "set experts.first_weights=model"
        )
    if cfg.wiring is not Wiring.plain:
        return (
            f"{kind} has its network in the layer, which model.wiring={cfg.wiring.name} takes apart: "
            "set model.wiring=plain"
        )
    if experts.bias:
        return f"experts.bias=true is of networks, not of {kind}: set it to false"
    if cfg.expert_widths:
        return f"{kind} have one width: leave model.expert_widths out"
    if experts.kind is not ExpertKind.low_rank:
        return None
    if cfg.lora.rank is None:
        return f"{kind} are one network with products of their own: set model.lora.rank"
    return low_rank_refusal(experts)
