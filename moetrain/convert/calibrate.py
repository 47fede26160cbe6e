"""What a dense model's layers see and do on training text, for the methods that look at it.

Shapes: T tokens, D model, F hidden units.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.convert.open_model import StoredModel
from moetrain.data import Corpus
from moetrain.models.feed_forward import DenseFeedForward
from moetrain.models.loss import cross_entropy_sum
from moetrain.moe import RoutingRecord
from moetrain.ops.activations import activate
from moetrain.upcycle import LayerCalibration


def calibrate(
    source: StoredModel, corpus: Corpus, rows: int, gradients: bool = False
) -> dict[int, LayerCalibration]:
    """Inputs and hidden activations of each dense layer on ``rows`` sequences, evenly from the text.

    ``gradients``: and what its loss owes to each activation; the passes are then differentiated, though no
    weight gets a gradient.
    """
    model, split = source.build().requires_grad_(False), corpus.train
    layers = {i: block.feed_forward for i, block in enumerate(model.blocks)}
    notes = {i: _Notes(layer) for i, layer in layers.items() if isinstance(layer, DenseFeedForward)}
    rows = min(len(split), rows)
    for row in range(rows):
        place = np.array([row * len(split) // rows])
        batch = split.batch(place, place)
        with torch.set_grad_enabled(gradients):
            hidden_BSD = model(
                batch.input_ids_BS, doc_ids_BS=batch.doc_ids_BS, positions_BS=batch.positions_BS
            ).hidden_BSD
            if gradients:
                cross_entropy_sum(hidden_BSD, model.head_weight, batch.labels_BS)[0].backward()
    return {i: layer_notes.close() for i, layer_notes in notes.items()}


class _Notes:
    """What one layer reads, and the gradient of what it returns, while the model runs.

    Its own output becomes a leaf of the graph where nothing before it has a gradient.
    """

    def __init__(self, layer: DenseFeedForward) -> None:
        self._layer = layer
        self._inputs: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._handle = layer.register_forward_hook(self._note)

    def close(self) -> LayerCalibration:
        self._handle.remove()
        layer, inputs_TD = self._layer, torch.cat(self._inputs)
        gate_TF = None if layer.w_gate_FD is None else F.linear(inputs_TD, layer.w_gate_FD)
        hidden_TF = activate(gate_TF, F.linear(inputs_TD, layer.w_up_FD), layer.activation)
        if not self._gradients:
            return LayerCalibration(inputs_TD, hidden_TF)
        gradient_TF = F.linear(torch.cat(self._gradients), layer.w_down_DF.t())
        return LayerCalibration(inputs_TD, hidden_TF, (hidden_TF * gradient_TF).abs_())

    def _note(
        self, module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, RoutingRecord | None]
    ) -> None:
        self._inputs.append(args[0].detach().reshape(-1, args[0].shape[-1]))
        if torch.is_grad_enabled():
            output[0].requires_grad_()
            output[0].register_hook(self._note_gradient)

    def _note_gradient(self, gradient_BSD: Tensor) -> None:
        self._gradients.append(gradient_BSD.reshape(-1, gradient_BSD.shape[-1]))
