"""What a decoder refuses of its blocks' wiring and of layers that differ, before anything is built."""

from __future__ import annotations

from dataclasses import fields

from moetrain.errors import UserError
from moetrain.models.options import ModelConfig, moe_layers
from moetrain.models.wiring_options import (
    MomentumConfig,
    MomentumKind,
    RouterInput,
    Wiring,
)

_OWN = "moe"  # the feed-forward layer whose steps a wiring can take apart
# what tells blocks or layers from those of published families
_BEYOND_FAMILIES = ("wiring", "router_input", "layer_experts", "layer_widths", "expert_widths")
_READ = {
    MomentumKind.heavy_ball: ("mu", "step"),
    MomentumKind.adam: ("mu", "step", "adam_layers", "adam_step", "beta1", "beta2", "decay"),
    MomentumKind.robust: ("rate", "condition", "curvature"),
}


def check_wiring(cfg: ModelConfig) -> None:
    """Raise UserError for the first setting of wiring and of layers' sizes that does not fit the others."""
    _check_lists(cfg)
    _is_of_moe_layers(cfg)
    _check_shortcut(cfg)
    _check_momentum(cfg)
    if cfg.scales.residual != 1 and cfg.wiring is not Wiring.plain:
        raise UserError(
            f"model.scales.residual={cfg.scales.residual} is of plain blocks, not of model.wiring="
            f"{cfg.wiring.name}: set one of the two back"
        )
    if cfg.sandwich_norms and cfg.wiring is not Wiring.plain:
        raise UserError(
            f"model.sandwich_norms=true is of plain blocks, not of model.wiring={cfg.wiring.name}: set one "
            "of the two back"
        )


def beyond_families(cfg: ModelConfig) -> str | None:
    """The first ``key=value`` by which blocks differ from those of families and of upcycling, or None."""
    plain = {f.name: f.default for f in fields(ModelConfig)}
    for name in _BEYOND_FAMILIES:
        if (value := getattr(cfg, name)) != plain[name]:
            return f"model.{name}={_shown(value)}"
    return None


def _is_of_moe_layers(cfg: ModelConfig) -> None:
    for name in ("wiring", "router_input"):
        value, plain = getattr(cfg, name), getattr(ModelConfig, name)
        if value is plain:
            continue
        key, instead = f"model.{name}={value.name}", f"set model.{name}={plain.name}"
        if not cfg.num_experts:
            raise UserError(f"{key} is of MoE layers, but model.num_experts=0: {instead}")
        if cfg.feed_forward != _OWN and value is not Wiring.momentum:  # which takes any layer's output
            raise UserError(f"{key} is of model.feed_forward={_OWN}, not {cfg.feed_forward}: {instead}")


def _check_shortcut(cfg: ModelConfig) -> None:
    shortcut = cfg.wiring is Wiring.shortcut
    if not shortcut and cfg.shortcut_from is not ModelConfig.shortcut_from:
        raise UserError(
            f"model.shortcut_from={cfg.shortcut_from.name} is of model.wiring=shortcut, not of "
            f"{cfg.wiring.name}: leave it out"
        )
    if shortcut and not cfg.num_shared_experts:
        raise UserError(
            "model.wiring=shortcut: shared experts read the stream after attention, but "
            "model.num_shared_experts=0: set model.num_shared_experts=1"
        )
    if shortcut and cfg.router_input is not RouterInput.own:
        raise UserError(
            f"model.router_input={cfg.router_input.name}: with model.wiring=shortcut the router reads what "
            "model.shortcut_from says: set model.router_input=own"
        )


def _check_momentum(cfg: ModelConfig) -> None:
    """A number that the kind does not read would seem to have an effect."""
    momentum = cfg.momentum
    if cfg.wiring is not Wiring.momentum:
        if momentum != MomentumConfig():
            raise UserError(
                f"model.momentum is of model.wiring=momentum, not of {cfg.wiring.name}: leave it out"
            )
        return
    for f in fields(MomentumConfig):
        value = getattr(momentum, f.name)
        if f.name == "kind" or value == f.default or f.name in _READ[momentum.kind]:
            continue
        owners = " or ".join(kind.name for kind, read in _READ.items() if f.name in read)
        raise UserError(
            f"model.momentum.{f.name}={value} is not used by model.momentum.kind={momentum.kind.name}: "
            f"leave it out, or take kind={owners}"
        )


def _check_lists(cfg: ModelConfig) -> None:
    """A number for each MoE layer, or each expert; the largest is the single key's: bounds go by that."""
    layers = len(moe_layers(cfg))
    for name, single, number, of in (
        ("layer_experts", "num_experts", layers, "MoE layers"),
        ("layer_widths", "d_ff_expert", layers, "MoE layers"),
        ("expert_widths", "d_ff_expert", cfg.num_experts, "experts"),
    ):
        values: tuple[int, ...] = getattr(cfg, name)
        if not values:
            continue
        key, most = f"model.{name}={_shown(values)}", getattr(cfg, single)
        if cfg.feed_forward != _OWN:
            raise UserError(f"{key} is of model.feed_forward={_OWN}, not {cfg.feed_forward}: leave it out")
        if len(values) != number:
            raise UserError(f"{key} has {len(values)} numbers, but there are {number} {of}: one for each")
        if max(values) != most:
            raise UserError(
                f"{key}: the largest is {max(values)}, but model.{single}={most}: "
                f"set model.{single}={max(values)}"
            )
    for name in ("layer_experts", "layer_widths"):
        if cfg.expert_widths and (values := getattr(cfg, name)):
            raise UserError(
                f"model.expert_widths={_shown(cfg.expert_widths)} is of layers that are alike, but "
                f"model.{name}={_shown(values)}: leave one of the two out"
            )


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return str(getattr(value, "name", value))
