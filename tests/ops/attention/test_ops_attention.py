"""Attention on a CPU against softmax written out: outputs, gradients, rounding, and how little is computed.

Shapes: B batch, S sequence, Q query heads, G key and value heads, H head width.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    BATCH,
    KINDS,
    assert_equal,
    attended,
    case_of,
    inputs,
    rounding_bound,
    seen_of,
    written_out,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moetrain.ops.attention import AUTO, SeenKeys, blocks, plan_attention, sdpa, seen_keys
from moetrain.ops.attention.blocks import CPU, Kernel, attend_by_blocks
from moetrain.ops.attention.seen_keys import first_tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("seq", [1, 37, 384, 389, 521])
def test_output_and_gradients_equal_softmax_written_out(seq: int, kv_heads: int, kind: str) -> None:
    seen = seen_of(kind, seq)
    assert_equal(lambda *tensors: attended(tensors, seen), inputs(seq, kv_heads), seen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
def test_each_backend_of_a_cpu_by_name(backend: str, kind: str) -> None:
    for seq in (1, 127, 569):
        seen = seen_of(kind, seq)
        assert_equal(lambda *tensors, s=seen: attended(tensors, s, backend), inputs(seq, 2), seen)


@given(
    st.integers(1, 23),
    st.integers(1, 9),
    st.none() | st.integers(1, 23),
    st.integers(0, 11),
    st.sampled_from([CPU, sdpa.RECOMPUTED]),
    st.data(),
)
def test_any_blocks_windows_documents_and_caches(
    seq: int, rows: int, window: int | None, cached: int, kernel: Kernel, data: st.DataObject
) -> None:
    ids = st.lists(st.lists(st.integers(0, 3), min_size=seq, max_size=seq), min_size=BATCH, max_size=BATCH)
    docs = None if cached else data.draw(st.none() | ids.map(torch.tensor))
    seen = SeenKeys(seq, cached, window, docs)
    q, _, _ = inputs(seq, 2)
    _, k, v = inputs(seq + cached, 2)
    assert_equal(lambda *tensors: attend_by_blocks(*tensors, seen, rows, kernel), [q, k, v], seen)


@given(st.lists(st.integers(-2, 3), min_size=1, max_size=29))
def test_the_first_token_of_a_document(ids: list[int]) -> None:
    row = torch.tensor([ids, ids[::-1]])
    assert first_tokens(row).tolist() == [[r.index(i) for i in r] for r in row.tolist()]


@pytest.mark.parametrize("autocast", [False, True], ids=["given", "autocast"])
@pytest.mark.parametrize(("dtype", "roundoff"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
def test_narrow_numbers_are_off_by_their_rounding(
    backend: str, dtype: torch.dtype, roundoff: float, autocast: bool
) -> None:
    exact, seen = inputs(521, 2), seen_of("documents", 521)
    tensors = [x.detach().to(torch.float32 if autocast else dtype).requires_grad_() for x in exact]
    with torch.autocast("cpu", dtype, enabled=autocast and dtype is not torch.float32):
        found = attended(tensors, seen, backend, dtype)
    assert found.dtype is dtype
    off = (found.double() - written_out(exact, seen)).abs()
    bound = rounding_bound(exact, seen, roundoff)
    assert bool((off <= bound).all())
    assert bool((off > 1e-3 * bound).any())  # else it would let anything pass
    gradients = torch.autograd.grad(found.sum(), tensors)
    assert all(g.dtype is tensors[0].dtype and bool(g.isfinite().all()) for g in gradients)


def test_gradients_of_keys_add_up_in_fp32() -> None:
    """Each of 64 blocks adds to the first key what is lost beside their sum in bf16."""
    seq, width = 64, 2
    q, k = torch.zeros(1, 1, seq, width, dtype=torch.bfloat16), torch.zeros(1, 1, seq, width).bfloat16()
    v = torch.zeros(1, 1, seq, width, dtype=torch.bfloat16, requires_grad=True)
    y = attend_by_blocks(q, k, v, SeenKeys(seq), 1, CPU)
    (dv,) = torch.autograd.grad(y, v, torch.ones_like(y))
    right = sum(1 / torch.arange(1.0, seq + 1)).item()
    assert abs(dv[0, 0, 0, 0].item() - right) <= right * 2**-8 * 2  # of each term, and of the sum


def test_backward_in_bf16_is_that_of_fp32() -> None:
    """torch's own kernel takes many times as long in bf16, most where the processor does not multiply it."""
    q, k, v = (x.bfloat16() for x in inputs(19, 6))
    bias = torch.zeros(19, 19).bfloat16()
    y, kept = CPU.forward(q, k, v, bias)
    dy = torch.ones_like(y)
    found = CPU.backward(dy, q, k, v, y, kept, bias)
    wide = CPU.backward(*(x.float() for x in (dy, q, k, v, y)), kept, bias.float())
    assert all(torch.equal(one, other) for one, other in zip(found, wide, strict=True))


def scores_computed(monkeypatch: pytest.MonkeyPatch, tensors: list[Tensor], seen: SeenKeys | None) -> int:
    """Pairs of a query and a key, of one head and row."""
    plan_attention(AUTO, case_of(tensors, seen))  # the self-test is not counted
    computed = 0

    def counted(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(query: Tensor, key: Tensor, *args: object, **kwargs: object) -> Any:
            nonlocal computed
            computed += query.shape[2] * key.shape[2]
            return kernel(query, key, *args, **kwargs)

        return call

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", counted(F.scaled_dot_product_attention))
        patch.setattr(blocks, "CPU", CPU._replace(forward=counted(CPU.forward)))
        attended(tensors, seen)
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
    last = attended([q[:, :, -1:], k, v], None)
    torch.testing.assert_close(last, attended([q, k, v], None)[:, -1:], rtol=1e-12, atol=1e-12)
    seen = seen_keys(400, 121, 7, None)
    assert scores_computed(monkeypatch, [q[:, :, :400], k, v], seen) < 400 * (128 + 7)
