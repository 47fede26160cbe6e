"""Windows of whole documents, for text that trains in part: an answer is never parted from its question.

Shapes: B rows, S positions, T = S + 1 tokens of a window, M documents of the stream, K of them that are used.
Documents follow one another as they do in the stream, as many to a window as fit whole; the rest of a window
is padding (input eos, no labels, a document id of its own). A window holds T tokens, of which each but a
document's first is a label if it trains. What is longer than T is cut there or left out; always left out is
what then has no token that trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property

import numpy as np

from moetrain.data.batch import IGNORE
from moetrain.data.chat.settings import Overlong
from moetrain.data.shards import StreamMask, TokenStream
from moetrain.data.window import Bools, Ints, Packing, Rows, labelled


@dataclass(frozen=True)
class Sums:
    """What became of a stream's documents. ``positions``: of all windows; ``tokens``: of documents used."""

    documents: int
    windows: int
    positions: int
    tokens: int
    trained: int
    cut: int
    overlong: int
    untrained: int

    def __str__(self) -> str:
        share = self.trained / max(1, self.positions)
        words = (
            f"{self.documents:,} conversations in {self.windows:,} sequences; {self.trained:,} tokens train "
            f"of {self.tokens:,}, {share:.0%} of the positions"
        )
        left = {
            "cut at the length of a sequence": self.cut,
            "left out as longer than that": self.overlong,
            "left out without a token that trains": self.untrained,
        }
        return "; ".join([words, *(f"{count:,} {what}" for what, count in left.items() if count)])


def sum_of(streams: Sequence[Sums]) -> Sums:
    """Those of several streams together."""
    return Sums(*map(sum, zip(*map(astuple, streams), strict=True)))


class PackedConversations:
    """Windows over one stream of which some tokens train."""

    def __init__(self, stream: TokenStream, mask: StreamMask, packing: Packing, token_bytes_V: Ints) -> None:
        self.stream, self._mask, self._packing, self._token_bytes_V = stream, mask, packing, token_bytes_V
        self._room = packing.seq_len + 1
        lengths_M = np.diff(stream.ends_M, prepend=0)
        self._long_M: Bools = lengths_M > self._room
        fits_M = ~self._long_M if packing.overlong is Overlong.drop else np.ones(len(lengths_M), bool)
        trains_M = (mask.trained_M > 0) & (mask.firsts_M < self._room)
        self._dropped = int((~fits_M).sum())
        self._untrained = int((fits_M & ~trains_M).sum())
        self._docs_K = np.flatnonzero(fits_M & trains_M)
        self._starts_K = (stream.ends_M - lengths_M)[self._docs_K]
        self._sizes_K = np.minimum(lengths_M[self._docs_K], self._room)
        self._firsts = _first_documents(self._sizes_K, self._room)  # of each window; one more at the end

    def __len__(self) -> int:
        return len(self._firsts) - 1

    @cached_property
    def sums(self) -> Sums:
        """Reads the masks of documents that are cut."""
        cut_K = self._long_M[self._docs_K]
        trained = int(self._mask.trained_M[self._docs_K[~cut_K]].sum())
        for start in self._starts_K[cut_K]:
            trained += int(self.stream.read_mask(int(start), int(start) + self._room).sum())
        return Sums(
            documents=len(self._docs_K),
            windows=len(self),
            positions=len(self) * self._packing.seq_len,
            tokens=int(self._sizes_K.sum()),
            trained=trained,
            cut=int(cut_K.sum()),
            overlong=self._dropped,
            untrained=self._untrained,
        )

    def rows(self, windows_B: Ints) -> Rows:
        shape = (len(windows_B), self._room)
        tokens_BT = np.full(shape, self._packing.eos_id, np.int64)
        doc_BT = np.full(shape, self.stream.num_documents, np.int64)
        trains_BT = np.zeros(shape, bool)
        place_BT = np.zeros(shape, np.int64)
        for row, window in enumerate(windows_B):
            filled = 0
            for k in range(self._firsts[window], self._firsts[window + 1]):
                start, size = int(self._starts_K[k]), int(self._sizes_K[k])
                at = slice(filled, filled + size)
                tokens_BT[row, at] = self.stream.read(start, start + size)
                trains_BT[row, at] = self.stream.read_mask(start, start + size)
                doc_BT[row, at] = self._docs_K[k]
                place_BT[row, at] = np.arange(size)
                filled += size
            place_BT[row, filled:] = np.arange(self._room - filled)
        labels_BS = np.where(trains_BT[:, 1:], tokens_BT[:, 1:], IGNORE)
        if not self._packing.reset_positions:
            place_BT[:] = np.arange(self._room)
        valid_BS = (doc_BT < self.stream.num_documents)[:, :-1]
        positions_BS = np.ascontiguousarray(place_BT[:, :-1])
        domains_M = self.stream.domains_M
        return labelled(tokens_BT, doc_BT, labels_BS, positions_BS, valid_BS, domains_M, self._token_bytes_V)


def _first_documents(sizes_K: Ints, room: int) -> Ints:
    """The first document of each window, where every window takes the next ones as long as they fit."""
    ends_K = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes_K)])
    firsts = [0]
    while firsts[-1] < len(sizes_K):
        firsts.append(int(np.searchsorted(ends_K, ends_K[firsts[-1]] + room, side="right")) - 1)
    return np.array(firsts, np.int64)
