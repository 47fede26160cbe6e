"""The loss of layers that predict further tokens, over one optimizer step.

Shapes: K such layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moetrain.data import Batch
from moetrain.data.batch import IGNORE
from moetrain.models.future import known, labels_ahead
from moetrain.train.future_options import FutureLossConfig


def counts_ahead(batch: Batch, layers: int) -> list[int]:
    """Of each such layer, how many tokens of ``batch`` it is to predict; then how many it sees."""
    labels_BS, valid_BS, ids_BS = batch.labels_BS, batch.valid_BS, batch.doc_ids_BS
    depths, seq = range(1, layers + 1), labels_BS.shape[1]
    targets = [int((labels_ahead(k, labels_BS, valid_BS, ids_BS) != IGNORE).sum()) for k in depths]
    seen = [known(k, seq, valid_BS, ids_BS, labels_BS.device).expand_as(labels_BS) for k in depths]
    return targets + [int(seen_BS.sum()) for seen_BS in seen]


class FutureLoss:
    """weight / K times the sum over layers of (sum of nats / targets of the whole step).

    ``sums_K`` adds up the nats of this rank's micro-batches, fp64, without a gradient.
    """

    def __init__(self, cfg: FutureLossConfig, places: range, device: torch.device) -> None:
        self.cfg, self.places = cfg, places
        self.targets: Sequence[int] = ()
        self.layer_tokens: dict[int, float] = {}  # by a layer's place
        self.sums_K = torch.zeros(len(places), dtype=torch.float64, device=device)

    def start(self, counts: Sequence[int]) -> None:
        """A new step, of which ``counts`` are :func:`counts_ahead` over all micro-batches and ranks."""
        layers = len(self.places)
        self.targets = counts[:layers]
        self.layer_tokens = {n: float(max(t, 1)) for n, t in zip(self.places, counts[layers:], strict=True)}
        self.sums_K = torch.zeros_like(self.sums_K)

    def add(self, step: int, sums: Sequence[Tensor]) -> Tensor | None:
        """A micro-batch's part of the loss, which its sums of nats make; None without such layers."""
        if not sums:
            return None
        self.sums_K += torch.stack([total.detach().double() for total in sums])
        means = [total / max(n, 1) for total, n in zip(sums, self.targets, strict=True)]
        return torch.stack(means).sum() * (self.cfg.at(step) / len(self.places))

    def means(self, sums_K: Sequence[float]) -> tuple[float, ...]:
        """Each layer's nats per target, of sums over all ranks."""
        return tuple(total / max(n, 1) for total, n in zip(sums_K, self.targets, strict=True))
