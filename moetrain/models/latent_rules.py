"""What latent attention refuses of the settings of heads, before anything is built."""

from __future__ import annotations

from moetrain.errors import UserError
from moetrain.models.options import LATENT, ModelConfig, QKNorm


def check_latent(cfg: ModelConfig) -> None:
    """UserError for heads that RoPE cannot turn, or a setting that latent attention does not read."""
    if cfg.attention != LATENT:
        return
    if cfg.latent.qk_rope_head_dim % 2:
        raise UserError(
            f"model.latent.qk_rope_head_dim={cfg.latent.qk_rope_head_dim} must be even: RoPE turns pairs of "
            "elements"
        )
    unused = {
        "head_dim": (cfg.head_dim, None, "the widths of a head stand in model.latent"),
        "num_kv_heads": (cfg.num_kv_heads, cfg.num_heads, "each query head has keys and values of its own"),
        "zero_centered_norms": (cfg.zero_centered_norms, False, "its own norms have no such weights"),
        "qkv_bias": (cfg.qkv_bias, False, "its matrices have no biases"),
        "qk_norm": (cfg.qk_norm.name, QKNorm.none.name, "its norms are those of the latent vectors"),
    }
    for key, (value, only, why) in unused.items():
        if value not in (None, only):
            raise UserError(
                f"model.{key}={value} does not go with model.attention={LATENT}: {why}; leave it out"
            )
