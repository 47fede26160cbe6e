"""The keys that each query sees, described by a few numbers instead of a mask of all pairs.

Shapes: B batch (1 where all rows share it), S queries, K keys; the queries are the last S of the K positions.
n queries and m keys of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Bounds = tuple[int, int, int]  # of a block: first query, end of the queries, first key


@dataclass(frozen=True)
class SeenKeys:
    """A query sees no key after it, none outside its window, and none of another document.

    ``window`` counts the query's own token. ``doc_ids_BS`` [B, S]: tokens of one id are one document,
    wherever they lie; documents and cached keys do not go together. ``documents``: no row holds more of
    them, and each is one run of tokens; None: not known on the host.
    """

    seq: int
    cached: int = 0
    window: int | None = None
    doc_ids_BS: Tensor | None = None
    documents: int | None = None

    def blocks(self, rows: int) -> list[Bounds]:
        """``rows`` queries a block: (first query, end of the queries, first key that any of them may see).

        On an accelerator documents leave out no keys, since looking at their ids would wait for the device.
        """
        starts = range(0, self.seq, rows)
        ends = [min(start + rows, self.seq) for start in starts]
        return [(s, e, self._lowest(s, e)) for s, e in zip(starts, ends, strict=True)]

    def biases(
        self, blocks: list[Bounds], dtype: torch.dtype, device: torch.device
    ) -> Callable[[int, int, int], Tensor]:
        """A function of a block's bounds that makes [B or 1, 1, n, m]: 0, or -inf for a key that is not seen.

        It is added to the scores of the queries from ``start`` to ``end`` and the keys from ``low`` to the
        last of those queries. All share the memory of the largest: each is valid until the next is made.
        """
        ids_BS, window = self.doc_ids_BS, self.window
        batch = 1 if ids_BS is None else ids_BS.shape[0]
        most = max((end - start) * (self.cached + end - low) for start, end, low in blocks)
        rows = max(end - start for start, end, _ in blocks)
        bias = torch.empty(batch * most, dtype=dtype, device=device)
        other = None if ids_BS is None else torch.empty(batch * most, dtype=torch.bool, device=device)
        later_nn = torch.ones(rows, rows, dtype=torch.bool, device=device).triu(1)
        unseen = float("-inf")

        def of(start: int, end: int, low: int) -> Tensor:
            n, m = end - start, self.cached + end - low
            bias_Bnm = bias[: batch * n * m].view(batch, n, m).zero_()
            if ids_BS is not None and other is not None:
                other_Bnm = other[: batch * n * m].view(batch, n, m)
                torch.ne(ids_BS[:, start:end, None], ids_BS[:, None, low:end], out=other_Bnm)
                bias_Bnm.masked_fill_(other_Bnm, unseen)
            bias_Bnm[:, :, m - n :].masked_fill_(later_nn[:n, :n], unseen)
            left = 0 if window is None else m - window  # keys that the block's last query sees no more
            if window is not None and left > 0:
                query_n1 = torch.arange(m - n, m, device=device)[:, None]
                key_left = torch.arange(left, device=device)
                bias_Bnm[:, :, :left].masked_fill_(key_left <= query_n1 - window, unseen)
            return bias_Bnm[:, None]

        return of

    def bias(self, start: int, end: int, low: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The bias of one block, in memory of its own."""
        return self.biases([(start, end, low)], dtype, device)(start, end, low)

    def _lowest(self, start: int, end: int) -> int:
        low = 0 if self.window is None else max(0, self.cached + start - self.window + 1)
        firsts = self._firsts
        return low if firsts is None else max(low, min(firsts[start:end]))

    @cached_property
    def _firsts(self) -> list[int] | None:
        """The first token of each query's document, least over the rows."""
        ids_BS = self.doc_ids_BS
        if ids_BS is None or ids_BS.device.type != "cpu":
            return None
        firsts: list[int] = first_tokens(ids_BS).amin(0).tolist()
        return firsts


def first_tokens(ids_BS: Tensor) -> Tensor:
    """[B, S]: for each token the place of the first one with its id, in its row."""
    sorted_BS, order_BS = ids_BS.sort(dim=1, stable=True)
    places_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
    begins_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    begins_BS[:, 1:] = sorted_BS[:, 1:] != sorted_BS[:, :-1]
    run_BS = torch.where(begins_BS, places_BS, 0).cummax(dim=1).values
    return torch.empty_like(order_BS).scatter_(1, order_BS, order_BS.gather(1, run_BS))


def seen_keys(
    seq: int, cached: int, window: int | None, doc_ids_BS: Tensor | None, documents: int | None = None
) -> SeenKeys | None:
    """None: plainly causal, or one query that sees all keys.

    ``documents`` as in :class:`SeenKeys`. Ids on an accelerator are not looked at, which would wait for it:
    unless ``documents`` is 1, they count as more than one document.
    """
    if window is not None and window >= cached + seq:
        window = None
    if doc_ids_BS is not None and (documents == 1 or _one_document(doc_ids_BS)):
        doc_ids_BS = None
    if doc_ids_BS is None and window is None and (cached == 0 or seq == 1):
        return None
    return SeenKeys(seq, cached, window, doc_ids_BS, None if doc_ids_BS is None else documents)


def _one_document(doc_ids_BS: Tensor) -> bool:
    """Whether every row on the CPU is seen to be one document."""
    return doc_ids_BS.device.type == "cpu" and bool((doc_ids_BS == doc_ids_BS[:, :1]).all())
