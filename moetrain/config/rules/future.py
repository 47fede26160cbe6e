"""Rules about training with layers that predict further tokens (``model.future``)."""

from __future__ import annotations

from moetrain.errors import UserError
from moetrain.moe.balance import chosen_controllers, make_terms
from moetrain.train.future_options import FutureLossConfig
from moetrain.train.options import TrainConfig

_ENGINE, _TASK = "native", "next_token"


def future_layers_are_proved(cfg: TrainConfig) -> None:
    """Raise UserError for what is not proved with them, and for numbers that would seem to have an effect."""
    loss = cfg.train.future
    if not cfg.model.future.layers:
        if loss != FutureLossConfig():
            raise UserError("train.future is of model.future.layers, which is 0: set it too, or leave it out")
        return
    if loss.later_step and loss.later_weight is None:
        raise UserError(
            f"train.future.later_step={loss.later_step} is not used without train.future.later_weight: "
            "set both"
        )
    key = f"model.future.layers={cfg.model.future.layers}"
    if cfg.train.task != _TASK:
        raise UserError(f"{key} is of train.task={_TASK}, not of {cfg.train.task}: leave one of the two out")
    if cfg.engine.name != _ENGINE:
        raise UserError(f"{key} is not proved with engine={cfg.engine.name}: set engine={_ENGINE}")
    chosen = chosen_controllers(cfg.balance.controllers, make_terms(cfg.balance.losses))
    if "sparsity" in [spec.name for spec, _ in chosen]:
        raise UserError(
            f"{key} is not proved with the controller sparsity, which counts all layers' tokens as one: take "
            "another balance"
        )
    for name in ("record", "force"):
        if (folder := getattr(cfg.replay, name)) is not None:
            raise UserError(
                f"{key} is not proved with replay.{name}={folder}, whose routes of generation have no such "
                "layers: leave one of the two out"
            )
