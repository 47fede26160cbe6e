"""FlexAttention's and the variable-length backend, as far as a CPU goes: numbers, block masks, document ends.

torch's flex_attention refuses gradients on a CPU; its operator, called directly, computes both passes there.
Shapes: B batch, S sequence, n blocks of queries or keys, T tokens, N documents, Q, G heads, H head width.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import BATCH, CPU, KINDS, all_pairs, assert_equal, case_of, documents, inputs, seen_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from moetrain.ops.attention import SeenKeys, flex, varlen
from moetrain.ops.attention.flex import BLOCK, block_mask, block_table

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from attention_memory import flex_operator


@pytest.fixture
def _operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "kernel", lambda: flex_operator)


@pytest.mark.usefixtures("_operator")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seq", [1, 37, 128, 311])
def test_flex_equals_softmax_written_out(seq: int, kind: str) -> None:
    tensors, seen = inputs(seq, 2), seen_of(kind, seq, window=140)
    plan = flex.prepare(case_of(tensors, seen))
    assert_equal(lambda *x: flex.attend(*x, plan), tensors, seen)


def by_pairs(seen: SeenKeys) -> tuple[Tensor, Tensor]:
    """[B, n, n]: whether a pair of the block is seen; whether all are, of a block within the sequence."""
    blocks = -(-seen.seq // BLOCK)
    pairs_BSS = all_pairs(seen, seen.seq)[:, 0]
    padding = (0, blocks * BLOCK - seen.seq) * 2
    pairs = torch.nn.functional.pad(pairs_BSS, padding).unflatten(2, (blocks, BLOCK))
    pairs = pairs.unflatten(1, (blocks, BLOCK)).transpose(2, 3)
    return pairs.flatten(3).any(3), pairs.flatten(3).all(3)


@settings(max_examples=25)
@given(
    st.integers(1, 4 * BLOCK),
    st.none() | st.integers(1, 3 * BLOCK),
    st.lists(st.integers(1, 300), max_size=9),
)
def test_consecutive_documents_leave_out_all_blocks_that_can_be(
    seq: int, window: int | None, lengths: list[int]
) -> None:
    ids = torch.repeat_interleave(torch.arange(len(lengths) + 1), torch.tensor([*lengths, seq]))[:seq]
    seen = SeenKeys(seq, 0, window, ids[None])
    some, all_ = block_table(seen, CPU)
    right_some, right_all = by_pairs(seen)
    assert torch.equal(some, right_some)
    assert torch.equal(all_, right_all)


@given(st.data(), st.integers(1, 3 * BLOCK), st.none() | st.integers(1, 2 * BLOCK))
@settings(max_examples=25)
def test_documents_in_any_order_lose_no_pair(data: st.DataObject, seq: int, window: int | None) -> None:
    ids = torch.randint(0, 4, (BATCH, seq), generator=torch.Generator().manual_seed(seq))
    ids[:, : seq // 2] += data.draw(st.integers(0, 3))
    seen = SeenKeys(seq, 0, window, ids)
    some, all_ = block_table(seen, CPU)
    right_some, right_all = by_pairs(seen)
    assert not bool((right_some & ~some).any())
    assert not bool((all_ & ~right_all).any())


@pytest.mark.parametrize("seq", [3 * BLOCK, 3 * BLOCK + 1, 5 * BLOCK - 1])
def test_the_block_mask_is_the_one_that_torch_makes_of_all_pairs(seq: int) -> None:
    ids_BS = torch.stack([torch.arange(seq) // 150, torch.arange(seq) // 201])
    ours = block_mask(SeenKeys(seq, 0, 170, ids_BS), CPU)
    torchs = create_block_mask(ours.mask_mod, BATCH, None, seq, seq, device="cpu")
    assert torch.equal(ours.to_dense(), torchs.to_dense())
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, indices = getattr(ours, f"{name}_num_blocks"), getattr(ours, f"{name}_indices")
        assert torch.equal(counts, getattr(torchs, f"{name}_num_blocks"))
        assert torch.equal(indices, getattr(torchs, f"{name}_indices"))


def test_a_block_mask_is_made_without_a_look_at_the_ids() -> None:
    ids_BS = torch.zeros(BATCH, 1000, dtype=torch.int64, device="meta")  # a look would raise
    made = block_mask(SeenKeys(1000, 0, 300, ids_BS), ids_BS.device)
    assert made.kv_indices.shape == (BATCH, 1, 8, 8)
    ends = varlen.runs(SeenKeys(1000, 0, None, ids_BS, documents=7), BATCH, ids_BS.device)
    assert ends.ends_N1.shape == (BATCH * 7 + 1,)


def test_cached_keys_have_no_block_mask() -> None:
    with pytest.raises(ValueError, match="3 cached keys"):
        block_mask(SeenKeys(5, 3), CPU)


def test_flex_is_traced_in_one_graph() -> None:
    """Without gradients, which torch's flex_attention refuses on a CPU."""
    tensors, seen = [x.detach() for x in inputs(200, 2)], seen_of("documents", 200)
    plan = flex.prepare(case_of(tensors, seen))
    traced = torch.compile(flex.attend, backend="eager", fullgraph=True)
    found = traced(*tensors, plan)
    other = replace(plan, block_mask=flex.prepare(case_of(tensors, seen_of("documents", 200))).block_mask)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(traced(*tensors, other), found)


def kernel_by_document(calls: list[Any]) -> Callable[..., Tensor]:
    """torch's varlen_attn for causal attention, one document and head at a time."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, most_q: int, most_k: int, *,
        window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        calls.append((ends_q, window_size, enable_gqa))
        assert ends_q is ends_k
        assert int(ends_q.diff().max()) <= most_q == most_k
        repeats = q.shape[1] // k.shape[1]
        assert enable_gqa == (repeats != 1)
        parts = []
        for start, end in zip(ends_q.tolist(), ends_q.tolist()[1:], strict=False):
            place = torch.arange(end - start)
            left, right = window_size
            seen = (place[:, None] + right >= place) & ((left < 0) | (place[:, None] - left <= place))
            scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end].repeat_interleave(repeats, 1))
            weights = (scores / q.shape[2] ** 0.5).masked_fill(~seen, float("-inf")).softmax(-1)
            parts.append(torch.einsum("hqk,khd->qhd", weights, v[start:end].repeat_interleave(repeats, 1)))
        return torch.cat(parts)

    return attend


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize(("kv_heads", "most"), [(2, 4), (6, 9)])
def test_varlen_equals_softmax_written_out(
    monkeypatch: pytest.MonkeyPatch, window: int | None, kv_heads: int, most: int
) -> None:
    """Row 0 has four documents, row 1 one: of the kernel's sequences, some do not exist."""
    calls: list[Any] = []
    monkeypatch.setattr(varlen, "_function", lambda: kernel_by_document(calls))
    seq = 37
    ids_BS = torch.stack(
        [(torch.arange(seq)[:, None] >= torch.tensor([1, 9, 30])).sum(1), torch.zeros(seq).long()]
    )
    tensors = inputs(seq, kv_heads)
    for docs in (ids_BS, None):
        seen = SeenKeys(seq, 0, window, docs, None if docs is None else most)
        plan = varlen.prepare(case_of(tensors, seen))
        assert_equal(lambda *x, p=plan: varlen.attend(*x, p), tensors, seen)
    assert calls[0][0].tolist() == [0, 1, 9, 30, 37] + [74] * (2 * most - 4)
    assert calls[0][0].dtype is torch.int32
    assert calls[1][0].tolist() == [0, 37, 74]


def test_torch_has_the_function_that_varlen_takes() -> None:
    found = varlen._function()
    if found is None:
        pytest.skip(f"torch {torch.__version__} has no variable-length attention with windows")
    assert found.__name__ == "varlen_attn"


def test_documents_that_take_turns_are_more_runs_than_documents() -> None:
    """The reason for ``SeenKeys.documents``: its giver says that each is one run."""
    with pytest.raises(ValueError, match="must be known on the host"):
        varlen.runs(SeenKeys(9, 0, None, documents(9)), BATCH, CPU)
