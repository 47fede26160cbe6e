"""What a decoder refuses of layers that predict further tokens, before anything is built."""

from __future__ import annotations

from moetrain.errors import UserError
from moetrain.models.options import LATENT, ModelConfig, attention_of

_OWN = "moe"
_ATTENTIONS = ("grouped_query", LATENT, "gated_delta")
# keys that tell blocks or layers from one another in ways that nothing says of layers after the last
_UNPROVED = ("wiring", "router_input", "layer_experts", "layer_widths", "expert_widths")


def check_future(cfg: ModelConfig) -> None:
    """Raise UserError for the first setting with which ``model.future.layers`` is not proved."""
    if not cfg.future.layers:
        return
    key = f"model.future.layers={cfg.future.layers}"
    for name in _UNPROVED:
        value, plain = getattr(cfg, name), getattr(ModelConfig, name)
        if value != plain:
            shown = getattr(value, "name", list(value) if isinstance(value, tuple) else value)
            raise UserError(f"{key} is not proved with model.{name}={shown}: set one of the two back")
    if cfg.num_experts and cfg.feed_forward != _OWN:
        raise UserError(f"{key} is of model.feed_forward={_OWN}, not of {cfg.feed_forward}: set it to 0")
    if (attention := attention_of(cfg, cfg.num_layers)) not in _ATTENTIONS:
        raise UserError(f"{key} is not proved with a plug-in's model.attention={attention}: set it to 0")
