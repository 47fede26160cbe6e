"""Which keys each query sees, told by the few numbers that decide it instead of a mask of all pairs.

Shapes: B batch (1 where all rows share it), S queries, K keys; the queries are the last S of the K positions.
n queries and m keys of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class SeenKeys:
    """No key after the query, none outside its window, none of another document.

    ``window`` counts the query's own token. ``doc_ids_BS`` [B, S]: tokens of one id are one document,
    wherever they lie; documents and cached keys do not go together.
    """

    seq: int
    cached: int = 0
    window: int | None = None
    doc_ids_BS: Tensor | None = None

    def blocks(self, rows: int) -> list[tuple[int, int, int]]:
        """``rows`` queries a block: (first query, end of the queries, first key that any of them may see).

        On an accelerator documents leave out no keys, since looking at their ids would wait for the device.
        """
        starts = range(0, self.seq, rows)
        ends = [min(start + rows, self.seq) for start in starts]
        return [(s, e, self._lowest(s, e)) for s, e in zip(starts, ends, strict=True)]

    def bias(self, start: int, end: int, low: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[B or 1, 1, n, m], added to the scores: 0, or -inf for a key that is not seen.

        Of queries ``start`` to ``end`` and of the keys from ``low`` to the last of those queries.
        """
        query_n1 = torch.arange(self.cached + start, self.cached + end, device=device)[:, None]
        key_m = torch.arange(low, self.cached + end, device=device)
        seen_Bnm = (key_m <= query_n1)[None]
        if self.window is not None:
            seen_Bnm = seen_Bnm & (key_m > query_n1 - self.window)
        if self.doc_ids_BS is not None:
            ids_BS = self.doc_ids_BS
            seen_Bnm = seen_Bnm & (ids_BS[:, start:end, None] == ids_BS[:, None, low:end])
        bias_Bnm = torch.zeros(seen_Bnm.shape, dtype=dtype, device=device)
        return bias_Bnm.masked_fill_(~seen_Bnm, float("-inf"))[:, None]

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


def seen_keys(seq: int, cached: int, window: int | None, doc_ids_BS: Tensor | None) -> SeenKeys | None:
    """None: plainly causal, or one query that sees all keys.

    On an accelerator, looking whether ``doc_ids_BS`` holds more than one document a row waits for it.
    """
    if window is not None and window >= cached + seq:
        window = None
    if doc_ids_BS is not None and bool((doc_ids_BS == doc_ids_BS[:, :1]).all()):
        doc_ids_BS = None
    if doc_ids_BS is None and window is None and (cached == 0 or seq == 1):
        return None
    return SeenKeys(seq, cached, window, doc_ids_BS)
