"""Rules about ``model.rope_scaling``."""

from __future__ import annotations

from dataclasses import fields

from moetrain.errors import UserError
from moetrain.models.rope_options import RopeKind, RopeScaling
from moetrain.train.options import TrainConfig

_SECTION = "model.rope_scaling"
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


def rope_options_are_used(cfg: TrainConfig, world: int) -> None:
    """A number that the kind does not read would seem to have an effect."""
    scaling = cfg.model.rope_scaling
    for field in fields(RopeScaling):
        value = getattr(scaling, field.name)
        if field.name == "kind" or value == field.default or field.name in _READ[scaling.kind]:
            continue
        owners = " or ".join(kind.name for kind, read in _READ.items() if field.name in read)
        raise UserError(
            f"{_SECTION}.{field.name}={value} is not used by {_SECTION}.kind={scaling.kind.name}: "
            f"leave it out, or take kind={owners}"
        )


def rope_ends_are_in_order(cfg: TrainConfig, world: int) -> None:
    scaling = cfg.model.rope_scaling
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if not getattr(scaling, low) < getattr(scaling, high):
            raise UserError(
                f"{_SECTION}.{high}={getattr(scaling, high)} must be above "
                f"{_SECTION}.{low}={getattr(scaling, low)}"
            )


def rope_knows_its_original_length(cfg: TrainConfig, world: int) -> None:
    scaling = cfg.model.rope_scaling
    if "original_max_positions" in _READ[scaling.kind] and scaling.original_max_positions is None:
        raise UserError(
            f"{_SECTION}.kind={scaling.kind.name} needs {_SECTION}.original_max_positions: "
            "the length that the model was trained on before"
        )


def yarn_has_more_than_one_frequency(cfg: TrainConfig, world: int) -> None:
    """It divides by the logarithm of the base."""
    m = cfg.model
    if m.rope_scaling.kind is RopeKind.yarn and m.rope_theta <= 1:
        raise UserError(f"model.rope_theta={m.rope_theta} must be above 1 for {_SECTION}.kind=yarn")


RULES = (
    rope_options_are_used,
    rope_ends_are_in_order,
    rope_knows_its_original_length,
    yarn_has_more_than_one_frequency,
)
