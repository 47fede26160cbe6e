"""What attention allocates: it grows with the tokens, and nothing has as many elements as there are pairs.

benchmarks/attention_memory.py counts; the lengths are those of its table. What is computed has smaller heads.
"""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from attention_memory import DOCUMENTS, HEADS, KINDS, LENGTHS, WIDTH, WINDOW, counted, documents

SIZES = {"blocks": ((1, 1), 8), "flex": (HEADS, WIDTH), "sdpa": ((1, 1), 8)}
ROWS = 512  # queries of a block


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("backend", "lengths"), [("blocks", LENGTHS), ("flex", LENGTHS), ("sdpa", LENGTHS[:2])], ids=SIZES
)
def test_bytes_grow_with_the_tokens_and_not_with_their_square(
    backend: str, lengths: tuple[int, ...], kind: str
) -> None:
    heads, width = SIZES[backend]
    found = {seq: counted(backend, KINDS[kind], seq, heads, width, torch.float32) for seq in lengths}
    for seq, made in found.items():
        reach = WINDOW if kind == "window" else seq // DOCUMENTS
        queries, table = heads[0] * width * seq, (seq // 128) ** 2
        assert made.largest <= max(queries, table if backend == "flex" else ROWS * (ROWS + reach))
    for seq in lengths[1:]:
        assert found[seq].peak < 2.1 * found[seq // 2].peak


@pytest.mark.parametrize("backend", ["blocks", "flex", "sdpa"])
def test_bytes_made_grow_with_documents_of_one_length(backend: str) -> None:
    """With 40 documents they grow longer, and blocks of queries get more keys each: that is more work too."""
    kind = partial(documents, length=200)
    lengths = (8192, 16384, 32768)
    totals = [counted(backend, kind, seq, *SIZES[backend], torch.float32).total for seq in lengths]
    assert totals[1] < 2.1 * totals[0]
    assert totals[2] < 2.1 * totals[1]
