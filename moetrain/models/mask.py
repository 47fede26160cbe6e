"""The attention mask of one forward pass, built once and shared by all layers.

Shapes: B batch (1 where all rows share it), S queries, C cached keys, K = C + S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask(
    seq: int,
    cached: int,
    window: int | None,
    doc_ids_BS: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """What is added to the scores: 0 or -inf, [B, 1, S, K]. None: plainly causal, or one query that sees all.

    The queries are the last ``seq`` of the K positions. ``window`` counts the query's own token. A row of
    ``doc_ids_BS`` that holds more than one document is masked between them, wherever their tokens lie;
    documents and cached keys do not go together. On an accelerator, looking at ``doc_ids_BS`` waits for it.
    """
    keys = cached + seq
    windowed = window is not None and window < keys
    if doc_ids_BS is not None and bool((doc_ids_BS == doc_ids_BS[:, :1]).all()):
        doc_ids_BS = None
    if doc_ids_BS is None and not windowed and (cached == 0 or seq == 1):
        return None
    query_S1 = torch.arange(cached, keys, device=device)[:, None]
    key_K = torch.arange(keys, device=device)
    seen_BSK = (key_K <= query_S1)[None]
    if windowed:
        seen_BSK = seen_BSK & (key_K > query_S1 - window)  # type: ignore[operator]
    if doc_ids_BS is not None:
        seen_BSK = seen_BSK & (doc_ids_BS[:, :, None] == doc_ids_BS[:, None, :])
    bias_BSK = torch.zeros(seen_BSK.shape, dtype=dtype, device=device)
    return bias_BSK.masked_fill_(~seen_BSK, float("-inf"))[:, None]
