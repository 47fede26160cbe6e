"""Attention by blocks of queries against softmax written out: outputs, gradients, and how little is computed.

Shapes: B batch, S sequence, Q query heads, G key and value heads, H head width.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.models.mask import attention_mask
from moetrain.ops import causal_attention
from moetrain.ops.causal_attention import attend, block_rows

BATCH, QUERY_HEADS, WIDTH = 2, 6, 5


def inputs(seq: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seq)
    return [
        torch.randn(BATCH, heads, seq, WIDTH, generator=generator, dtype=dtype).requires_grad_()
        for heads in (QUERY_HEADS, kv_heads, kv_heads)
    ]


def documents(seq: int) -> Tensor:
    """Row 0 of two documents of very different lengths; row 1 of documents that take turns."""
    return torch.stack([(torch.arange(seq) >= seq - 3).long(), torch.arange(seq) % 3])


def mask_of(kind: str, seq: int) -> Tensor | None:
    docs = documents(seq) if kind == "documents" else None
    window = 19 if kind == "window" else None
    return attention_mask(seq, 0, window, docs, torch.float64, torch.device("cpu"))


def written_out(q_BQSH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, mask: Tensor | None) -> Tensor:
    repeats = q_BQSH.shape[1] // k_BGSH.shape[1]
    k, v = k_BGSH.repeat_interleave(repeats, 1), v_BGSH.repeat_interleave(repeats, 1)
    seq = q_BQSH.shape[2]
    seen = torch.ones(seq, seq).tril().bool() if mask is None else mask == 0
    scores = (q_BQSH @ k.transpose(2, 3) / WIDTH**0.5).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("kind", ["causal", "window", "documents"])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("seq", [1, 37, 384, 389, 521])
def test_output_and_gradients_equal_softmax_written_out(seq: int, kv_heads: int, kind: str) -> None:
    tensors, mask = inputs(seq, kv_heads), mask_of(kind, seq)
    expected, found = written_out(*tensors, mask), attend(*tensors, mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn(found.shape, dtype=found.dtype)
    for right, ours in zip(
        torch.autograd.grad(expected, tensors, dy), torch.autograd.grad(found, tensors, dy), strict=True
    ):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)


def scores_computed(monkeypatch: pytest.MonkeyPatch, tensors: list[Tensor], mask: Tensor | None) -> int:
    computed = 0
    sdpa = F.scaled_dot_product_attention

    def counted(query: Tensor, key: Tensor, *args: object, **kwargs: object) -> Tensor:
        nonlocal computed
        computed += query.shape[2] * key.shape[2]
        return sdpa(query, key, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(causal_attention.F, "scaled_dot_product_attention", counted)
        attend(*tensors, mask)
    return computed


@pytest.mark.parametrize(
    ("seq", "kind", "share"),
    [(512, "causal", 0.625), (512, "documents", 0.625), (2048, "documents", 0.5625), (2048, "causal", 1.0)],
)
def test_keys_after_a_block_of_queries_are_not_computed(
    monkeypatch: pytest.MonkeyPatch, seq: int, kind: str, share: float
) -> None:
    """At 2048 without a mask torch's own kernel leaves such keys out, by larger blocks than ours."""
    with torch.no_grad():
        assert scores_computed(monkeypatch, inputs(seq, 6), mask_of(kind, seq)) == share * seq**2


def test_cached_keys_and_single_queries_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(521, 2)
    mask = attention_mask(400, 121, None, None, torch.float64, torch.device("cpu"))
    with torch.no_grad():
        assert scores_computed(monkeypatch, [q[:, :, :400], k, v], mask) == 400 * 521
        last = attend(q[:, :, -1:], k, v, None)
        torch.testing.assert_close(last, attend(q, k, v, None)[:, -1:], rtol=1e-12, atol=1e-12)


def test_an_accelerator_gets_the_whole_sequence_at_once() -> None:
    assert block_rows(4096, torch.float32, True, torch.device("meta")) is None
    assert block_rows(4096, torch.float32, True, torch.device("cpu")) == 512
    assert block_rows(4096, torch.bfloat16, True, torch.device("cpu")) == 512
    assert block_rows(511, torch.bfloat16, True, torch.device("cpu")) is None
    assert block_rows(383, torch.float32, True, torch.device("cpu")) is None
