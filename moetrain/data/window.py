"""A window: the tokens of one sequence and its labels, however the window was chosen.

Shapes: B rows, S positions, T = S + 1 tokens of a window, M documents of a stream, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from moetrain.data.batch import IGNORE
from moetrain.data.chat.settings import Overlong
from moetrain.data.shards import TokenStream

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Rows(NamedTuple):
    """The arrays of a Batch; see there."""

    input_ids_BS: Ints
    labels_BS: Ints
    doc_ids_BS: Ints
    positions_BS: Ints
    domain_ids_BS: Ints
    token_domains_BS: Ints
    byte_counts_BS: Ints
    valid_BS: Bools


@dataclass(frozen=True)
class Packing:
    """How a split is cut. ``keep_documents``: attention and prediction stay within a document.

    ``overlong``: what becomes of a document that trains in part and is longer than a window; one that was to
    be refused is refused before.
    """

    seq_len: int
    eos_id: int
    keep_documents: bool
    reset_positions: bool
    pad_last: bool
    overlong: Overlong = Overlong.truncate


class Windows(Protocol):
    """The sequences of one stream."""

    @property
    def stream(self) -> TokenStream: ...
    def __len__(self) -> int: ...
    def rows(self, windows_B: Ints) -> Rows: ...


def labelled(
    tokens_BT: Ints,
    doc_BT: Ints,
    labels_BS: Ints,
    positions_BS: Ints,
    valid_BS: Bools,
    domains_M: npt.NDArray[np.uint16],
    token_bytes_V: Ints,
) -> Rows:
    """The rows of windows whose labels are known; a document of padding is M."""
    doc_BS = doc_BT[:, :-1]
    no_label_BS = labels_BS == IGNORE
    last = len(domains_M) - 1
    domain_doc_BS = np.where(no_label_BS, doc_BS, doc_BT[:, 1:]).clip(max=last)
    return Rows(
        input_ids_BS=tokens_BT[:, :-1],
        labels_BS=labels_BS,
        doc_ids_BS=doc_BS,
        positions_BS=positions_BS,
        domain_ids_BS=domains_M[domain_doc_BS].astype(np.int64),
        token_domains_BS=domains_M[doc_BS.clip(max=last)].astype(np.int64),
        byte_counts_BS=np.where(no_label_BS, 0, token_bytes_V[np.where(no_label_BS, 0, labels_BS)]),
        valid_BS=valid_BS,
    )
