"""The section ``model.future``: layers after the decoder's that predict tokens further ahead."""

from dataclasses import dataclass, field

from moetrain.bounds import at_least


@dataclass(frozen=True)
class FutureConfig:
    """Layer k of ``layers`` predicts the token k + 1 places on, in training (``train.future``).

    Their attention and window are those of the decoder's last layer, their experts those of its MoE layers.
    """

    layers: int = field(default=0, metadata=at_least(0, 64))
    dense: bool = False  # their feed-forward layer is dense, though the model has experts (ERNIE 4.5)
    shared_norm: bool = False  # their output goes through the decoder's last norm; else each has its own
