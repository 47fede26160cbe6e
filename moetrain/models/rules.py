"""What a decoder refuses of its settings, before anything is built."""

from __future__ import annotations

from dataclasses import fields

from moetrain.arithmetic import divisor_near
from moetrain.bounds import check_ranges
from moetrain.errors import UserError
from moetrain.models.attention_rules import check_attention
from moetrain.models.latent_rules import check_latent
from moetrain.models.layer_options import READ_BY
from moetrain.models.lora_options import split_target
from moetrain.models.options import LATENT, LayerWindow, ModelConfig, attention_kinds, moe_layers
from moetrain.models.rope import rope_width
from moetrain.models.rope_options import RopeKind, RopeScaling
from moetrain.moe.rules import shared_refusal

_ROPE = "model.rope_scaling"
# key -> the kinds of attention that read it
_OF_ATTENTIONS = dict.fromkeys(
    ("rope_fraction", "out_bias", "attention_sinks", "attention_gate", "window_rope_theta"),
    ("grouped_query",),
) | {"rope_interleaved": ("grouped_query", LATENT)}
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
        "mscale",
        "mscale_all_dim",
    ),
}


def check_model(cfg: ModelConfig) -> None:
    """Raise UserError for the first setting that is out of its range, or does not fit the others."""
    check_ranges(cfg, "model")
    check_heads(cfg)
    _check_layers(cfg)
    if line := shared_refusal(cfg.num_shared_experts, cfg.d_ff_shared, cfg.shared_gate):
        raise UserError(line)
    if cfg.mlp_bias and len(moe_layers(cfg)) == cfg.num_layers:
        raise UserError("model.mlp_bias=true is of dense layers, and all layers are MoE: set it to false")
    check_attention(cfg)
    _check_rope(cfg)
    _check_windows(cfg)
    _check_own_attention(cfg)
    _check_lora(cfg)
    _check_sections(cfg)


def _check_windows(cfg: ModelConfig) -> None:
    """A pattern is of some layers that have the window, and others that have not; so is a base of theirs."""
    if not cfg.window_pattern and cfg.window_rope_theta is not None:
        raise UserError(
            f"model.window_rope_theta={cfg.window_rope_theta} is of some layers, those with the window that "
            "model.window_pattern names, and there is no pattern: set it too, or set model.rope_theta instead"
        )
    if not (pattern := cfg.window_pattern):
        return
    key = f"model.window_pattern=[{','.join(window.name for window in pattern)}]"
    if cfg.sliding_window is None:
        raise UserError(f"{key} is of model.sliding_window, which is null: set both, or neither")
    if len(pattern) > cfg.num_layers:
        raise UserError(f"{key} names {len(pattern)} layers, but model.num_layers={cfg.num_layers}")
    if len(set(pattern)) == 1:
        null = "" if pattern[0] is LayerWindow.sliding else ", and set model.sliding_window=null"
        raise UserError(f"{key}: all layers are alike; leave it out{null}")


def _check_own_attention(cfg: ModelConfig) -> None:
    """What only some kinds of attention read would seem to have an effect on the others."""
    for name, readers in _OF_ATTENTIONS.items():
        value, kinds = getattr(cfg, name), attention_kinds(cfg)
        if value != getattr(ModelConfig, name) and not set(kinds) & set(readers):
            raise UserError(
                f"model.{name}={value} is read by model.attention={' or '.join(readers)}, not by "
                f"model.attention={' or '.join(kinds)}: leave it out"
            )
    others = [kind for kind in attention_kinds(cfg) if kind not in _OF_ATTENTIONS["out_bias"]]
    if cfg.scales.attention is not None and others:
        raise UserError(
            f"model.scales.attention={cfg.scales.attention} would not reach "
            f"model.attention={' or '.join(others)}: leave it out"
        )
    if cfg.scales.round_embedding and cfg.scales.embedding == 1:
        raise UserError("model.scales.round_embedding=true rounds model.scales.embedding=1.0: leave it out")


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
    check_latent(cfg)
    if cfg.attention == LATENT:
        return
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
    turned = rope_width(head_dim, cfg.rope_fraction)
    if turned < 2 or turned % 2:
        raise UserError(
            f"model.rope_fraction={cfg.rope_fraction} of model.head_dim={head_dim} is {turned} element(s), "
            "and RoPE turns pairs: the product must be even, and 2 or more"
        )
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
        least, most = getattr(scaling, low), getattr(scaling, high)
        if not (least < most or (least == most and low == "beta_slow")):  # Kimi-K2 has both betas 1
            raise UserError(f"{_ROPE}.{high}={most} must be above {_ROPE}.{low}={least}")
    _check_mscale(cfg)
    if "original_max_positions" in _READ[scaling.kind] and scaling.original_max_positions is None:
        raise UserError(
            f"{_ROPE}.kind={scaling.kind.name} needs {_ROPE}.original_max_positions: "
            "the length that the model was trained on before"
        )
    if scaling.kind is RopeKind.yarn and cfg.rope_theta <= 1:  # it divides by the logarithm of the base
        raise UserError(f"model.rope_theta={cfg.rope_theta} must be above 1 for {_ROPE}.kind=yarn")


def _check_mscale(cfg: ModelConfig) -> None:
    """Numbers that the rotation does not read: it goes by both of them, and by ``attention_factor`` first."""
    scaling = cfg.rope_scaling
    both = None not in (scaling.mscale, scaling.mscale_all_dim) and scaling.attention_factor is None
    if scaling.mscale is not None and not both:
        raise UserError(
            f"{_ROPE}.mscale={scaling.mscale} is not used without {_ROPE}.mscale_all_dim, nor beside "
            f"{_ROPE}.attention_factor: leave it out"
        )
    if scaling.mscale_all_dim is not None and not both and cfg.attention != LATENT:
        raise UserError(
            f"{_ROPE}.mscale_all_dim={scaling.mscale_all_dim} is not used without {_ROPE}.mscale, nor beside "
            f"{_ROPE}.attention_factor, but by model.attention={LATENT}: leave it out"
        )


def _check_sections(cfg: ModelConfig) -> None:
    """A number in the section of a layer that the model has none of would seem to have an effect."""
    for section, layers in READ_BY.items():
        if cfg.feed_forward in layers:
            continue
        options = getattr(cfg, section)
        for field in fields(options):
            value = getattr(options, field.name)
            if value != getattr(type(options)(), field.name):
                shown = getattr(value, "name", value)
                raise UserError(
                    f"model.{section}.{field.name}={shown} is not used by model.feed_forward="
                    f"{cfg.feed_forward}: leave it out, or take {' or '.join(layers)}"
                )
