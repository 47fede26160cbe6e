"""What a dense model's layers see and do on training text, for the methods that look at it.

Shapes: T tokens, D model, F hidden units.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.convert.open_model import StoredModel
from moetrain.data import Corpus
from moetrain.models.feed_forward import DenseFeedForward
from moetrain.ops.activations import activate
from moetrain.upcycle import LayerCalibration


@torch.no_grad()
def calibrate(source: StoredModel, corpus: Corpus, rows: int) -> dict[int, LayerCalibration]:
    """Inputs and hidden activations of each dense layer on ``rows`` sequences, evenly from the text."""
    model, split = source.build(), corpus.train
    seen: dict[int, list[Tensor]] = {}
    layers = {i: block.feed_forward for i, block in enumerate(model.blocks)}
    dense = {i: layer for i, layer in layers.items() if isinstance(layer, DenseFeedForward)}
    handles = [layer.register_forward_pre_hook(_noting(seen.setdefault(i, []))) for i, layer in dense.items()]
    rows = min(len(split), rows)
    for row in range(rows):
        place = np.array([row * len(split) // rows])
        batch = split.batch(place, place)
        model(batch.input_ids_BS, doc_ids_BS=batch.doc_ids_BS, positions_BS=batch.positions_BS)
    for handle in handles:
        handle.remove()
    found = {}
    for i, layer in dense.items():
        inputs_TD = torch.cat(seen[i])
        gate_TF = None if layer.w_gate_FD is None else F.linear(inputs_TD, layer.w_gate_FD)
        hidden_TF = activate(gate_TF, F.linear(inputs_TD, layer.w_up_FD), layer.activation)
        found[i] = LayerCalibration(inputs_TD, hidden_TF)
    return found


def _noting(into: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        into.append(args[0].reshape(-1, args[0].shape[-1]))

    return note
