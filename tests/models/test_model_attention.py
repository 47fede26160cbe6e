"""Attention against a loop over queries: grouped heads, normalised queries and keys, windows, documents.

Shapes: B batch, S sequence, D model, H head width, Q query heads, G key and value heads.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from model_cases import TINY, decoder, tokens
from torch import Tensor

from moetrain.compat import compiles_gradients
from moetrain.errors import UserError
from moetrain.models.attention import Attention, head_shape, plan_of, require_backend
from moetrain.models.cache import KVCache
from moetrain.models.options import AttentionBackend, QKNorm
from moetrain.models.rope import apply_rope, rope_table
from moetrain.ops.attention import SeenKeys, seen_keys
from moetrain.ops.cpu import libraries

BATCH, SEQ = 3, 11
Seen = Callable[[int, int, int], bool]


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + TINY.norm_eps).sqrt() * weight


def by_loop(attention: Attention, x_BSD: Tensor, seen: Seen) -> Tensor:
    """softmax over the keys that ``seen(row, query, key)`` allows, one query and head at a time."""
    q_heads, kv_heads, width = attention.num_heads, attention.num_kv_heads, attention.head_dim
    weights = (attention.w_q_QD, attention.w_k_GD, attention.w_v_GD)
    biases = (attention.b_q_Q, attention.b_k_G, attention.b_v_G)
    q, k, v = (
        x_BSD @ weight.t() + (0 if bias is None else bias)
        for weight, bias in zip(weights, biases, strict=True)
    )
    if attention.qk_norm is QKNorm.full:
        q, k = rms(q, attention.q_norm.weight_D), rms(k, attention.k_norm.weight_D)
    q, k, v = (t.reshape(BATCH, SEQ, -1, width) for t in (q, k, v))
    if attention.qk_norm is QKNorm.head:
        q, k = rms(q, attention.q_norm.weight_D), rms(k, attention.k_norm.weight_D)
    table = rope_table(torch.arange(SEQ)[None], width, TINY.rope_theta, torch.float64)
    q, k = apply_rope(q, table), apply_rope(k, table)
    if attention.qk_norm is QKNorm.head_after_rope:
        q, k = rms(q, attention.q_norm.weight_D), rms(k, attention.k_norm.weight_D)
    y = torch.zeros_like(q)
    for b in range(BATCH):
        for i in range(SEQ):
            keys = [j for j in range(SEQ) if seen(b, i, j)]
            for h in range(q_heads):
                g = h // (q_heads // kv_heads)
                p = (k[b, keys, g] @ q[b, i, h] / width**0.5).softmax(0)
                y[b, i, h] = p @ v[b, keys, g]
    return y.reshape(BATCH, SEQ, -1) @ attention.w_out_DQ.t()


def build(
    qk_norm: QKNorm = QKNorm.none, num_kv_heads: int = 2, qkv_bias: bool = False
) -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    attention = Attention(
        replace(TINY, qk_norm=qk_norm, num_kv_heads=num_kv_heads, qkv_bias=qkv_bias)
    ).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(0, 0.4)
    return attention, torch.randn(BATCH, SEQ, TINY.d_model, dtype=torch.float64)


def run(attention: Attention, x_BSD: Tensor, window: int | None, doc_ids_BS: Tensor | None) -> Tensor:
    table = rope_table(torch.arange(SEQ)[None], attention.head_dim, TINY.rope_theta, torch.float64)
    return attention(
        x_BSD, table, plan_of(TINY, head_shape(TINY), x_BSD, seen_keys(SEQ, 0, window, doc_ids_BS))
    )


@pytest.mark.parametrize("qk_norm", list(QKNorm))
@pytest.mark.parametrize(("num_kv_heads", "qkv_bias"), [(1, False), (2, True), (6, False)])
def test_attention_equals_the_loop(qk_norm: QKNorm, num_kv_heads: int, qkv_bias: bool) -> None:
    attention, x = build(qk_norm, num_kv_heads, qkv_bias)
    expected = by_loop(attention, x, lambda b, i, j: j <= i)
    torch.testing.assert_close(run(attention, x, None, None), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("window", [1, 2, 7, SEQ - 1])
def test_a_sliding_window_counts_the_query_itself(window: int) -> None:
    attention, x = build()
    expected = by_loop(attention, x, lambda b, i, j: j <= i < j + window)
    torch.testing.assert_close(run(attention, x, window, None), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("window", [None, 3])
def test_documents_do_not_see_each_other_even_when_interleaved(window: int | None) -> None:
    attention, x = build()
    docs = torch.tensor([[4] * 5 + [9] * 6, [1] * SEQ, [0, 1] * 5 + [2]])
    expected = by_loop(
        attention, x, lambda b, i, j: j <= i < j + (window or SEQ) and bool(docs[b, i] == docs[b, j])
    )
    torch.testing.assert_close(run(attention, x, window, docs), expected, rtol=1e-11, atol=1e-11)


def test_the_causal_path_is_taken_exactly_where_it_is_right() -> None:
    def bias(seen: SeenKeys | None) -> Tensor:
        assert seen is not None
        return seen.bias(0, seen.seq, 0, torch.float32, torch.device("cpu"))

    one_each = torch.tensor([[3] * 5, [8] * 5])
    assert seen_keys(5, 0, None, None) is None
    assert seen_keys(5, 0, None, one_each) is None
    assert seen_keys(5, 0, 5, None) is None
    assert seen_keys(1, 7, None, None) is None
    assert seen_keys(1, 7, 8, None) is None
    assert bias(seen_keys(5, 0, 4, one_each)).shape == (1, 1, 5, 5)
    assert bias(seen_keys(5, 0, None, torch.tensor([[3] * 5, [8] * 4 + [9]]))).shape == (2, 1, 5, 5)
    assert bias(seen_keys(2, 3, None, None)).isfinite().tolist() == [[[[True] * 4 + [False], [True] * 5]]]
    assert bias(seen_keys(1, 4, 3, None)).isfinite().tolist() == [[[[False, False, True, True, True]]]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_kv_heads": 4}, "model.num_kv_heads=4 does not divide model.num_heads=6: take 3"),
        ({"head_dim": None}, "model.num_heads=6 does not divide model.d_model=23"),
        ({"head_dim": 9}, "model.head_dim=9 must be even"),
    ],
)
def test_heads_that_do_not_fit_are_refused(changes: dict[str, int | None], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Attention(replace(TINY, **changes))


@pytest.mark.parametrize("name", ["sdpa", "blocks"])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 100}])
def test_a_backend_that_is_asked_for_by_name(name: str, changes: dict[str, int]) -> None:
    ids_BS, docs_BS = tokens(2, 600), torch.arange(600).expand(2, 600) // 250
    outputs = []
    for attention in (AttentionBackend(name), AttentionBackend.auto):
        model = decoder(attention_backend=attention, num_layers=1, **changes)
        outputs.append(model(ids_BS, doc_ids_BS=docs_BS, documents=3).hidden_BSD)
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)


def test_an_unfit_backend_is_refused_but_not_for_a_cache() -> None:
    model, cpu = decoder(attention_backend=AttentionBackend.flex), torch.device("cpu")
    with pytest.raises(
        UserError, match=r"model.attention_backend=flex: on a cpu device .*model.attention_backend=auto"
    ):
        model(tokens(2, 7))
    model(tokens(2, 7), cache=KVCache(TINY.num_layers, 7))
    cfg = replace(TINY, attention_backend=AttentionBackend.varlen)
    with pytest.raises(UserError, match=r"model.attention_backend=varlen: its kernel is CUDA's"):
        require_backend(cfg, 7, torch.bfloat16, cpu)


@pytest.mark.skipif(not compiles_gradients(torch.__version__), reason="this torch compiles gradients wrongly")
def test_compiling_keeps_numbers_and_may_pick_libraries() -> None:
    """Long enough to go by blocks of queries and, uncompiled, through oneDNN, which inductor cannot lower."""
    width, seq = 64, 521
    libraries.has_onednn.cache_clear()  # as in a run that compiles before its first step
    operators: set[str] = set()

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        for part in graph.modules():
            operators.update(str(node.target) for node in getattr(part, "graph", torch.fx.Graph()).nodes)
        return graph.forward

    torch.manual_seed(0)
    cfg = replace(TINY, d_model=width, head_dim=16, num_kv_heads=3)
    attention = Attention(cfg)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    x = torch.randn(BATCH, seq, width)
    rope = rope_table(torch.arange(seq)[None], 16, TINY.rope_theta, torch.float32)
    plan = plan_of(cfg, head_shape(cfg), x, None)
    assert plan.backend == "blocks"
    results = []
    for function in (torch.compile(attention, backend=backend), attention):
        y = function(x, rope, plan)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(attention.parameters()))])
    for compiled, plain in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
    assert any("method mm of" in name for name in operators)
    assert not any("linear_pointwise" in name for name in operators)
