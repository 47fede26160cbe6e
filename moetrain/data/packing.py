"""Packing: a stream of documents cut into overlapping windows, with the borders between documents kept.

Shapes: B rows, S positions, N tokens of the stream, M documents, V vocabulary. Window i covers the tokens
i*S to i*S + S: the first S are its input, the last S its labels. Neighbours share one token, so every
token but the stream's first is a label exactly once. Where the stream ends within a window, that window is
dropped for training and padded for held-out text (input eos, no labels, a document id of its own).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from moetrain.data.batch import IGNORE, Batch
from moetrain.data.chat.settings import Overlong
from moetrain.data.conversations import PackedConversations
from moetrain.data.shards import TokenStream
from moetrain.data.window import Ints, Packing, Rows, Windows, labelled

__all__ = ["PackedSplit", "Packing", "Rows"]


class PackedStream:
    """Windows over one stream of which all tokens train."""

    def __init__(self, stream: TokenStream, packing: Packing, token_bytes_V: Ints) -> None:
        self.stream = stream
        self._packing = packing
        self._token_bytes_V = token_bytes_V

    def __len__(self) -> int:
        targets = max(0, self.stream.num_tokens - 1)
        rest = self._packing.seq_len - 1 if self._packing.pad_last else 0
        return (targets + rest) // self._packing.seq_len

    def rows(self, windows_B: Ints) -> Rows:
        S = self._packing.seq_len
        start_B1 = windows_B[:, None] * S
        tokens_BT = np.full((len(windows_B), S + 1), self._packing.eos_id, np.int64)
        for row, start in enumerate(start_B1[:, 0]):
            tokens = self.stream.read(int(start), int(start) + S + 1)
            tokens_BT[row, : len(tokens)] = tokens
        place_BT = start_B1 + np.arange(S + 1)
        doc_BT = np.searchsorted(self.stream.ends_M, place_BT, side="right")  # M on padding
        labels_BS = tokens_BT[:, 1:].copy()
        labels_BS[place_BT[:, 1:] >= self.stream.num_tokens] = IGNORE
        if self._packing.keep_documents:
            labels_BS[doc_BT[:, 1:] != doc_BT[:, :-1]] = IGNORE
        place_BS, doc_BS = place_BT[:, :-1], doc_BT[:, :-1]
        return labelled(
            tokens_BT,
            doc_BT,
            labels_BS,
            self._positions(place_BS, doc_BS, start_B1),
            place_BS < self.stream.num_tokens,
            self.stream.domains_M,
            self._token_bytes_V,
        )

    def _positions(self, place_BS: Ints, doc_BS: Ints, start_B1: Ints) -> Ints:
        """From the start of the row or, with ``reset_positions``, of the document if that is later."""
        if not self._packing.reset_positions:
            return place_BS - start_B1
        first_BS = np.where(doc_BS > 0, self.stream.ends_M[doc_BS - 1], 0)
        return place_BS - np.maximum(first_BS, start_B1)


def windows_of(stream: TokenStream, packing: Packing, token_bytes_V: Ints) -> Windows:
    """The sequences of a stream: where its documents train in part, each has a whole document or several."""
    if stream.mask is not None:
        return PackedConversations(stream, stream.mask, packing, token_bytes_V)
    return PackedStream(stream, packing, token_bytes_V)


class PackedSplit:
    """The sequences of one side of a corpus: its parts' windows, one part after the other.

    ``overlong``: for each stream what becomes of documents that are too long, None: what ``packing`` says.
    ``num_bytes`` is the UTF-8 length of its documents. ``byte_scale`` times the tokens' own lengths gives
    bytes of text: exactly 1 for bytes and byte-level BPE, else this split's ratio of the two.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        packing: Packing,
        token_bytes_V: Ints,
        fingerprint: str,
        overlong: Sequence[Overlong | None] | None = None,
    ) -> None:
        self._parts: list[Windows] = [
            windows_of(stream, packing if each is None else replace(packing, overlong=each), token_bytes_V)
            for stream, each in zip(streams, overlong or [None] * len(streams), strict=True)
        ]
        self._ends = np.cumsum([len(part) for part in self._parts])
        self._packing = packing
        self.fingerprint = fingerprint
        self.num_documents = sum(stream.num_documents for stream in streams)
        self.num_tokens = sum(stream.num_tokens for stream in streams)
        self.num_bytes = sum(stream.num_bytes for stream in streams)
        self.byte_scale = self.num_bytes / max(1, sum(stream.counted_bytes for stream in streams))

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def seq_len(self) -> int:
        return self._packing.seq_len

    @property
    def part_lengths(self) -> list[int]:
        """Sequences of each part; they are numbered one part after the other."""
        return [len(part) for part in self._parts]

    @property
    def parts(self) -> Sequence[Windows]:
        return self._parts

    @property
    def part_tokens(self) -> list[int]:
        return [part.stream.num_tokens for part in self._parts]

    def rows(self, indices_B: Ints) -> Rows:
        """The sequences ``indices_B``, each from 0 to ``len(self)`` - 1. Raises IndexError outside of it."""
        if indices_B.size and not 0 <= indices_B.min() <= indices_B.max() < len(self):
            raise IndexError(f"sequences {indices_B.min()} to {indices_B.max()} of a split of {len(self)}")
        part_B = np.searchsorted(self._ends, indices_B, side="right")
        if len(self._parts) == 1:
            return self._parts[0].rows(indices_B)
        pieces: list[tuple[Ints, Rows]] = []
        for index, part in enumerate(self._parts):
            chosen = np.flatnonzero(part_B == index)
            if chosen.size:
                start = self._ends[index] - len(part)
                rows = part.rows(indices_B[chosen] - start)
                pieces.append((chosen, rows))
        place_B = np.argsort(np.concatenate([chosen for chosen, _ in pieces]))
        columns = zip(*(rows for _, rows in pieces), strict=True)
        return Rows(*(np.concatenate(column)[place_B] for column in columns))

    def sequence(self, index: int) -> Rows:
        """One sequence; every array has shape [S]."""
        return Rows(*(array[0] for array in self.rows(np.array([index]))))

    def batch(
        self, indices_B: Ints, sample_ids_B: Ints, blank_B: npt.NDArray[np.bool_] | None = None
    ) -> Batch:
        """The sequences as tensors. ``blank_B`` rows keep their shape, but are padding and hold no label."""
        rows = self.rows(indices_B)
        if blank_B is not None and blank_B.any():
            rows.labels_BS[blank_B] = IGNORE
            rows.byte_counts_BS[blank_B] = 0
            rows.valid_BS[blank_B] = False
        tensor = torch.from_numpy
        return Batch(
            input_ids_BS=tensor(np.ascontiguousarray(rows.input_ids_BS)),
            labels_BS=tensor(rows.labels_BS),
            doc_ids_BS=tensor(np.ascontiguousarray(rows.doc_ids_BS))
            if self._packing.keep_documents
            else None,
            positions_BS=tensor(rows.positions_BS) if self._packing.reset_positions else None,
            sample_ids_B=tensor(sample_ids_B.astype(np.int64)),
            domain_ids_BS=tensor(rows.domain_ids_BS),
            token_domains_BS=tensor(rows.token_domains_BS),
            byte_counts_BS=tensor(rows.byte_counts_BS),
            valid_BS=None if rows.valid_BS.all() else tensor(rows.valid_BS),
            num_targets=int((rows.labels_BS != IGNORE).sum()),
            documents=1 + int((np.diff(rows.doc_ids_BS) != 0).sum(1).max(initial=0)),
        )
