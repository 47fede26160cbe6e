"""What a decoder refuses of its settings, before anything is built."""

from __future__ import annotations

from dataclasses import fields

from moetrain.arithmetic import divisor_near
from moetrain.bounds import check_ranges
from moetrain.errors import UserError
from moetrain.models.layer_options import READ_BY
from moetrain.models.lora_options import split_target
from moetrain.models.options import ModelConfig
from moetrain.models.rope_options import RopeKind, RopeScaling
from moetrain.moe.rules import shared_refusal

_ROPE = "model.rope_scaling"
_READ = {
    RopeKind.none: (),
    RopeKind.linear: ("factor",),
    RopeKind.llama3: ("factor", "original_max_positions", "low_freq_factor", "high_freq_factor"),
    RopeKind.yarn: (
        "factor",
        "original_max_positions",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
    ),
}


def check_model(cfg: ModelConfig) -> None:
    """Raise UserError for the first setting that is out of its range, or does not fit the others."""
    check_ranges(cfg, "model")
    check_heads(cfg)
    _check_layers(cfg)
    if line := shared_refusal(cfg.num_shared_experts, cfg.d_ff_shared, cfg.shared_gate):
        raise UserError(line)
    _check_rope(cfg)
    _check_lora(cfg)
    _check_sections(cfg)


def _check_lora(cfg: ModelConfig) -> None:
    for target in cfg.lora.targets:
        try:
            split_target(target)
        except ValueError as error:
            raise UserError(f"model.lora.targets: {error}") from None
    for field in fields(cfg.lora) if cfg.lora.rank is None else ():
        value = getattr(cfg.lora, field.name)
        if value != field.default:
            raise UserError(f"model.lora.{field.name}={value} is not used without model.lora.rank: set both")
    if cfg.lora.rank is not None and not cfg.lora.targets:
        raise UserError(f"model.lora.rank={cfg.lora.rank}, but model.lora.targets names nothing to add to")
    if cfg.lora.rank is not None and cfg.expert_widths:
        raise UserError(
            f"model.lora.rank={cfg.lora.rank} is of experts of one width: leave model.expert_widths out"
        )


def check_heads(cfg: ModelConfig) -> None:
    """UserError where heads do not divide the width or one another, or cannot be turned by RoPE."""
    if cfg.head_dim is None and cfg.d_model % cfg.num_heads:
        raise UserError(
            f"model.num_heads={cfg.num_heads} does not divide model.d_model={cfg.d_model}: "
            f"take {divisor_near(cfg.d_model, cfg.num_heads)} heads, or set model.head_dim"
        )
    head_dim = cfg.head_dim if cfg.head_dim is not None else cfg.d_model // cfg.num_heads
    if head_dim % 2:
        of = f" = model.d_model={cfg.d_model} / model.num_heads={cfg.num_heads}"
        made = "" if cfg.head_dim is not None else of
        raise UserError(f"model.head_dim={head_dim}{made} must be even: RoPE turns pairs of elements")
    if cfg.num_kv_heads is not None and cfg.num_heads % cfg.num_kv_heads:
        raise UserError(
            f"model.num_kv_heads={cfg.num_kv_heads} does not divide model.num_heads={cfg.num_heads}: "
            f"take {divisor_near(cfg.num_heads, cfg.num_kv_heads)}"
        )


def _check_layers(cfg: ModelConfig) -> None:
    """Experts that no layer uses are a mistake; a dense model says ``num_experts=0``."""
    if cfg.first_dense > cfg.num_layers:
        raise UserError(f"model.first_dense={cfg.first_dense} exceeds model.num_layers={cfg.num_layers}")
    # of the layers l with (l + 1) % moe_every == 0, those from first_dense on
    if cfg.num_experts and cfg.num_layers // cfg.moe_every <= cfg.first_dense // cfg.moe_every:
        raise UserError(
            f"model.num_experts={cfg.num_experts}, but model.moe_every={cfg.moe_every} and "
            f"model.first_dense={cfg.first_dense} leave none of the {cfg.num_layers} layers MoE: "
            "lower them, or set model.num_experts=0 for a dense model"
        )


def _check_rope(cfg: ModelConfig) -> None:
    scaling = cfg.rope_scaling
    for field in fields(RopeScaling):
        value = getattr(scaling, field.name)
        if field.name == "kind" or value == field.default or field.name in _READ[scaling.kind]:
            continue
        owners = " or ".join(kind.name for kind, read in _READ.items() if field.name in read)
        raise UserError(  # a number that the kind does not read would seem to have an effect
            f"{_ROPE}.{field.name}={value} is not used by {_ROPE}.kind={scaling.kind.name}: "
            f"leave it out, or take kind={owners}"
        )
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if not getattr(scaling, low) < getattr(scaling, high):
            raise UserError(
                f"{_ROPE}.{high}={getattr(scaling, high)} must be above {_ROPE}.{low}={getattr(scaling, low)}"
            )
    if "original_max_positions" in _READ[scaling.kind] and scaling.original_max_positions is None:
        raise UserError(
            f"{_ROPE}.kind={scaling.kind.name} needs {_ROPE}.original_max_positions: "
            "the length that the model was trained on before"
        )
    if scaling.kind is RopeKind.yarn and cfg.rope_theta <= 1:  # it divides by the logarithm of the base
        raise UserError(f"model.rope_theta={cfg.rope_theta} must be above 1 for {_ROPE}.kind=yarn")


def _check_sections(cfg: ModelConfig) -> None:
    """A number in the section of a layer that the model has none of would seem to have an effect."""
    for section, layers in READ_BY.items():
        if cfg.feed_forward in layers:
            continue
        options = getattr(cfg, section)
        for field in fields(options):
            value = getattr(options, field.name)
            if value != getattr(type(options)(), field.name):
                raise UserError(
                    f"model.{section}.{field.name}={value} is not used by model.feed_forward="
                    f"{cfg.feed_forward}: leave it out, or take {' or '.join(layers)}"
                )
