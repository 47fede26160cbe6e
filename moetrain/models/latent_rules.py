"""What latent attention refuses of the settings of heads, before anything is built."""

from __future__ import annotations

from dataclasses import fields

from moetrain.errors import UserError
from moetrain.models.latent_options import LatentConfig
from moetrain.models.options import LATENT, ModelConfig, QKNorm


def check_latent(cfg: ModelConfig) -> None:
    """UserError for a setting that ``model.attention`` does not read, or for heads that RoPE cannot turn."""
    if cfg.attention != LATENT:
        for field in fields(LatentConfig):
            value = getattr(cfg.latent, field.name)
            if value != field.default:
                raise UserError(
                    f"model.latent.{field.name}={value} is not used by model.attention={cfg.attention}: "
                    f"leave it out, or set model.attention={LATENT}"
                )
        return
    if cfg.latent.qk_rope_head_dim % 2:
        raise UserError(
            f"model.latent.qk_rope_head_dim={cfg.latent.qk_rope_head_dim} must be even: RoPE turns pairs of "
            "elements"
        )
    unused = {
        "head_dim": (cfg.head_dim, None, "the widths of a head stand in model.latent"),
        "num_kv_heads": (cfg.num_kv_heads, cfg.num_heads, "each query head has keys and values of its own"),
        "qkv_bias": (cfg.qkv_bias, False, "its matrices have no biases"),
        "qk_norm": (cfg.qk_norm.name, QKNorm.none.name, "its norms are those of the latent vectors"),
    }
    for key, (value, only, why) in unused.items():
        if value not in (None, only):
            raise UserError(
                f"model.{key}={value} does not go with model.attention={LATENT}: {why}; leave it out"
            )
