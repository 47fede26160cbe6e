"""Whether an upcycled model computes what its source does, measured on held-out text.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from moetrain.convert.open_model import StoredModel
from moetrain.data import IGNORE, Batch
from moetrain.errors import ProofError
from moetrain.models.decoder import Decoder
from moetrain.upcycle import Promise

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # of the largest logit; thirty layers err by 3e-6


@torch.no_grad()
def prove(source: StoredModel, target: StoredModel, batches: Sequence[Batch], promise: Promise) -> str:
    """What was measured, in one line. Raises ProofError where a promise was not kept."""
    dense, moe = source.build(), target.build()
    largest = scale = 0.0
    nats = {"before": 0.0, "after": 0.0}
    tokens = 0
    for batch in batches:
        before_BSV, after_BSV = (_logits(model, batch) for model in (dense, moe))
        asked_BS = batch.labels_BS != IGNORE
        largest = max(largest, (before_BSV - after_BSV)[asked_BS].abs().max().item())
        scale = max(scale, before_BSV[asked_BS].abs().max().item())
        labels = batch.labels_BS[asked_BS]
        tokens += len(labels)
        for name, logits_BSV in (("before", before_BSV), ("after", after_BSV)):
            nats[name] += F.cross_entropy(logits_BSV[asked_BS], labels, reduction="sum").item()
    line = (
        f"proof on {tokens} held-out tokens: largest difference of a logit {largest:.3g} (largest logit "
        f"{scale:.3g}); loss {nats['before'] / tokens:.4f} before, {nats['after'] / tokens:.4f} after"
    )
    allowed = TOLERANCE[next(dense.parameters()).dtype] * scale
    if promise.preserves and not largest <= allowed:
        raise ProofError(
            f"{line}: but at most {allowed:.3g} was promised, since {promise.reason}; nothing was written"
        )
    return line


def _logits(model: Decoder, batch: Batch) -> torch.Tensor:
    hidden_BSD = model(batch.input_ids_BS, None, batch.doc_ids_BS, batch.positions_BS).hidden_BSD
    return model.logits(hidden_BSD)
