"""Batch: what one forward and backward of the model gets. B sequences of S positions."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from moetrain.ops.transfer import to_device

_ONLY_EVALUATED = ("domain_ids_BS", "byte_counts_BS")
IGNORE = -100  # the label of a position that has no target


@dataclass(frozen=True)
class Batch:
    """CPU tensors, int64 but for ``valid_BS``.

    input_ids_BS    the tokens read.
    labels_BS       the token that follows each; IGNORE where there is none to predict: padding and, when
                    attention stays within documents, the step from one document to the next.
    doc_ids_BS      same number in a row = same document; None: attention crosses documents.
    positions_BS    place within the document's part of the row; None: 0 to S - 1 for every row.
    sample_ids_B    place of each row in the run's order (training) or in the held-out split.
    domain_ids_BS   index into ``Corpus.domains``: the label's domain; without label, the input's.
    byte_counts_BS  bytes of text that each label stands for, 0 without label: the end of a text costs
                    bits and stands for no byte.
    valid_BS        bool, False on padding; None: no padding in this batch.
    num_targets     how many labels are not IGNORE.
    token_domains_BS  index into ``Corpus.domains`` of the tokens read, for routers; None: not known.
    documents       no row has more of them, and each is one run of positions; None: not known.
    """

    input_ids_BS: Tensor
    labels_BS: Tensor
    doc_ids_BS: Tensor | None
    positions_BS: Tensor | None
    sample_ids_B: Tensor
    domain_ids_BS: Tensor
    byte_counts_BS: Tensor
    valid_BS: Tensor | None
    num_targets: int
    documents: int | None = None
    token_domains_BS: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """All of it on ``device``, by copies that the host does not wait for."""
        return self._moved(device, ())

    def to_train(self, device: torch.device | str) -> Batch:
        """What a training step reads on ``device``; the rest stays on the host."""
        return self._moved(device, _ONLY_EVALUATED)

    def _moved(self, device: torch.device | str, left: tuple[str, ...]) -> Batch:
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        tensors = {name: x for name, x in values.items() if isinstance(x, Tensor) and name not in left}
        return Batch(**values | {name: to_device(x, device) for name, x in tensors.items()})
