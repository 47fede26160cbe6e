"""What a dense model does on some text, for the methods that look at it.

Shapes: T tokens, D model, F hidden units of a dense layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moetrain.errors import UserError


@dataclass(frozen=True)
class LayerCalibration:
    """One layer's feed-forward input, and its hidden activations (what the down projection sees).

    ``saliency_TF``: |activation times the gradient of the text's loss by it|, what the loss would change by
    if the unit were scaled for that token, to first order.
    """

    inputs_TD: Tensor | None = None
    hidden_TF: Tensor | None = None
    saliency_TF: Tensor | None = None


def need(calibration: LayerCalibration | None, kind: str, width: int, layer: int, wanted_by: str) -> Tensor:
    """``kind`` (a field of LayerCalibration) of a layer; UserError where missing, empty or not that wide."""
    values: Tensor | None = None if calibration is None else getattr(calibration, kind)
    if values is None or len(values) == 0:
        raise UserError(
            f"{wanted_by} needs calibration activations ({kind}) of layer {layer}: give some text"
        )
    if values.shape[1] != width:
        raise UserError(f"layer {layer}: calibration {kind} is {values.shape[1]} wide, the layer {width}")
    return values
