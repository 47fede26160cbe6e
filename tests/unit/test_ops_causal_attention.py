"""Attention by blocks of queries against softmax written out: outputs, gradients, and how little is computed.

Shapes: B batch, S sequence, Q query heads, G key and value heads, H head width.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.ops import attention_blocks
from moetrain.ops.attention_blocks import attend_by_blocks
from moetrain.ops.causal_attention import attend, block_rows
from moetrain.ops.seen_keys import SeenKeys, first_tokens, seen_keys

BATCH, QUERY_HEADS, WIDTH = 2, 6, 5
CPU = torch.device("cpu")


def inputs(seq: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seq)
    return [
        torch.randn(BATCH, heads, seq, WIDTH, generator=generator, dtype=dtype).requires_grad_()
        for heads in (QUERY_HEADS, kv_heads, kv_heads)
    ]


def documents(seq: int) -> Tensor:
    """Row 0 of two documents of very different lengths; row 1 of documents that take turns."""
    return torch.stack([(torch.arange(seq) >= seq - 3).long(), torch.arange(seq) % 3])


def seen_of(kind: str, seq: int) -> SeenKeys | None:
    docs = documents(seq) if kind.endswith("documents") else None
    return seen_keys(seq, 0, 19 if kind.startswith("window") else None, docs)


def all_pairs(seen: SeenKeys | None, seq: int) -> Tensor:
    """[B or 1, 1, S, K], by a loop over pairs."""
    if seen is None:
        return torch.ones(seq, seq).tril().bool()[None, None]
    docs = [[0] * seq] if seen.doc_ids_BS is None else seen.doc_ids_BS.tolist()
    window, cached = seen.window or seq + seen.cached, seen.cached
    return torch.tensor(
        [
            [
                [
                    k <= q < k + window and (seen.doc_ids_BS is None or row[q] == row[k])
                    for k in range(cached + seq)
                ]
                for q in range(cached, cached + seq)
            ]
            for row in docs
        ]
    )[:, None]


def written_out(q_BQSH: Tensor, k_BGKH: Tensor, v_BGKH: Tensor, seen: SeenKeys | None) -> Tensor:
    repeats = q_BQSH.shape[1] // k_BGKH.shape[1]
    k, v = k_BGKH.repeat_interleave(repeats, 1), v_BGKH.repeat_interleave(repeats, 1)
    allowed = all_pairs(seen, q_BQSH.shape[2])
    scores = (q_BQSH @ k.transpose(2, 3) / q_BQSH.shape[3] ** 0.5).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def assert_equal(
    ours: Callable[..., Tensor], tensors: list[Tensor], seen: SeenKeys | None, tolerance: float = 1e-12
) -> None:
    expected, found = written_out(*tensors, seen), ours(*tensors)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    dy = torch.randn(found.shape, dtype=found.dtype)
    for right, ours_ in zip(
        torch.autograd.grad(expected, tensors, dy), torch.autograd.grad(found, tensors, dy), strict=True
    ):
        torch.testing.assert_close(ours_, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["causal", "window", "documents", "window, documents"])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("seq", [1, 37, 384, 389, 521])
def test_output_and_gradients_equal_softmax_written_out(seq: int, kv_heads: int, kind: str) -> None:
    seen = seen_of(kind, seq)
    assert_equal(lambda *tensors: attend(*tensors, seen), inputs(seq, kv_heads), seen)


@given(st.integers(1, 23), st.integers(1, 9), st.none() | st.integers(1, 23), st.integers(0, 11), st.data())
def test_any_blocks_windows_documents_and_caches(
    seq: int, rows: int, window: int | None, cached: int, data: st.DataObject
) -> None:
    ids = st.lists(st.lists(st.integers(0, 3), min_size=seq, max_size=seq), min_size=BATCH, max_size=BATCH)
    docs = None if cached else data.draw(st.none() | ids.map(torch.tensor))
    seen = SeenKeys(seq, cached, window, docs)
    q, _, _ = inputs(seq, 2)
    _, k, v = inputs(seq + cached, 2)
    assert_equal(lambda *tensors: attend_by_blocks(*tensors, seen, rows), [q, k, v], seen)


@given(st.lists(st.integers(-2, 3), min_size=1, max_size=29))
def test_the_first_token_of_a_document(ids: list[int]) -> None:
    row = torch.tensor([ids, ids[::-1]])
    assert first_tokens(row).tolist() == [[r.index(i) for i in r] for r in row.tolist()]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_narrow_numbers_and_autocast(dtype: torch.dtype, bound: float) -> None:
    tensors, seen = inputs(521, 2, torch.float32), seen_of("documents", 521)
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        found = attend(*tensors, seen)
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), written_out(*tensors, seen), rtol=bound, atol=bound)
    gradients = torch.autograd.grad(found.sum(), tensors)
    assert all(g.dtype is torch.float32 and bool(g.isfinite().all()) for g in gradients)


def scores_computed(monkeypatch: pytest.MonkeyPatch, tensors: list[Tensor], seen: SeenKeys | None) -> int:
    """Pairs of a query and a key, of one head and row."""
    computed = 0

    def counted(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(query: Tensor, key: Tensor, *args: object, **kwargs: object) -> Any:
            nonlocal computed
            computed += query.shape[2] * key.shape[2]
            return kernel(query, key, *args, **kwargs)

        return call

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", counted(F.scaled_dot_product_attention))
        patch.setattr(attention_blocks, "_forward", counted(attention_blocks._forward))
        attend(*tensors, seen)
    return computed


@pytest.mark.parametrize(
    ("seq", "kind", "share"),
    [(512, "causal", 0.625), (512, "documents", 0.625), (2048, "documents", 0.5625), (2048, "causal", 1.0)],
)
def test_keys_after_a_block_of_queries_are_not_computed(
    monkeypatch: pytest.MonkeyPatch, seq: int, kind: str, share: float
) -> None:
    """Of these documents row 1's reach over all; without them torch's own kernel goes by blocks at 2048."""
    assert scores_computed(monkeypatch, inputs(seq, 6), seen_of(kind, seq)) == share * seq**2


def test_keys_before_a_window_or_a_document_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seq, rows = 2048, 256
    window = scores_computed(monkeypatch, inputs(seq, 6), seen_of("window", seq))
    assert window == rows**2 + 7 * rows * (rows + 18)
    docs = (torch.arange(seq) // 100).expand(BATCH, seq)
    spans = [256 * i // 100 * 100 for i in range(8)]
    assert scores_computed(monkeypatch, inputs(seq, 6), seen_keys(seq, 0, None, docs)) == sum(
        rows * (rows * (i + 1) - low) for i, low in enumerate(spans)
    )


def test_single_queries_are_one_call_and_windows_leave_keys_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = inputs(521, 2)
    last = attend(q[:, :, -1:], k, v, None)
    torch.testing.assert_close(last, attend(q, k, v, None)[:, -1:], rtol=1e-12, atol=1e-12)
    seen = seen_keys(400, 121, 7, None)
    assert scores_computed(monkeypatch, [q[:, :, :400], k, v], seen) < 400 * (128 + 7)


def test_an_accelerator_gets_the_whole_sequence_at_once() -> None:
    assert block_rows(4096, torch.float32, True, torch.device("meta")) is None
    assert block_rows(8192, torch.float32, True, CPU) == 512
    assert block_rows(4096, torch.bfloat16, True, CPU) == 512
    assert block_rows(511, torch.bfloat16, True, CPU) is None
    assert block_rows(383, torch.float32, True, CPU) is None


class Made(TorchDispatchMode):
    """Counts what operators make: elements of the largest tensor, and bytes of all."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, Tensor) and not func.is_view:
                self.largest = max(self.largest, x.numel())
                self.total += x.numel() * x.element_size()
        return made


@pytest.mark.parametrize("kind", ["window", "documents"])
def test_bytes_grow_with_the_tokens_and_not_with_their_square(kind: str) -> None:
    """Documents of a fixed length; no tensor is larger than a block's bias, or than the queries."""
    found = {}
    for seq in (8192, 16384, 32768):
        docs = (torch.arange(seq) // 200)[None] if kind == "documents" else None
        seen = seen_keys(seq, 0, 300 if kind == "window" else None, docs)
        tensors = [torch.randn(1, 2, seq, 4).requires_grad_() for _ in range(3)]
        with Made() as made:
            attend(*tensors, seen).sum().backward()
        assert made.largest <= max(512 * (512 + 300), 2 * 4 * seq)
        found[seq] = made.total
    assert found[16384] < 2.1 * found[8192]
    assert found[32768] < 2.1 * found[16384]
