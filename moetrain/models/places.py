"""Which layers of a decoder are MoE."""

from __future__ import annotations

from moetrain.models.options import ModelConfig


def is_moe_layer(cfg: ModelConfig, layer: int) -> bool:
    """Whether layer ``layer`` (from 0) is MoE."""
    return cfg.num_experts > 0 and layer >= cfg.first_dense and (layer + 1) % cfg.moe_every == 0


def has_moe_layers(cfg: ModelConfig) -> bool:
    return any(is_moe_layer(cfg, layer) for layer in range(cfg.num_layers))
