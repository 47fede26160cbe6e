"""What a decoder refuses of the attentions of its layers, before anything is built."""

from __future__ import annotations

from dataclasses import fields

from moetrain.arithmetic import divisor_near
from moetrain.errors import UserError
from moetrain.models.attention_options import READ_BY
from moetrain.models.options import LATENT, ModelConfig, attention_kinds


def check_attention(cfg: ModelConfig) -> None:
    """Raise UserError for the first setting of the layers' attentions that does not fit the others."""
    _check_pattern(cfg)
    kinds = attention_kinds(cfg)
    for section, reader in READ_BY.items():
        options = getattr(cfg, section)
        for field in fields(options):
            value = getattr(options, field.name)
            if value != field.default and reader not in kinds:
                raise UserError(
                    f"model.{section}.{field.name}={value} is read by attention {reader}, and the layers' "
                    f"are {', '.join(kinds)}: leave it out, or set model.attention={reader}"
                )
    heads, keys = cfg.gated_delta.num_value_heads, cfg.gated_delta.num_key_heads
    if heads % keys:
        raise UserError(
            f"model.gated_delta.num_key_heads={keys} does not divide model.gated_delta.num_value_heads="
            f"{heads}: take {divisor_near(heads, keys)}"
        )


def _check_pattern(cfg: ModelConfig) -> None:
    pattern = cfg.attention_pattern
    shown = f"model.attention_pattern=[{','.join(pattern)}]"
    if pattern and cfg.attention != ModelConfig.attention:
        raise UserError(
            f"{shown} names every layer's attention, and so does model.attention={cfg.attention}: "
            "leave one of the two out"
        )
    if LATENT in pattern:  # whose heads are another model's: not proved beside others
        raise UserError(
            f"{shown}: {LATENT} is of all layers or of none; set model.attention={LATENT} instead"
        )
    if len(pattern) > cfg.num_layers:
        raise UserError(
            f"{shown} has {len(pattern)} names, more than model.num_layers={cfg.num_layers}: "
            f"take the first {cfg.num_layers}"
        )
