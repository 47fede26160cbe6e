"""Latent attention against a loop over queries; its cache, its count and what it refuses.

Shapes: B batch, S sequence, D model, N heads; R, L latent widths of queries, and of keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_cases import TINY, decoder, tokens
from torch import Tensor

from moetrain.errors import UserError
from moetrain.models.attention import plan_of
from moetrain.models.cache import KVCache
from moetrain.models.count import abstract_decoder, count_parameters, flops_breakdown
from moetrain.models.latent import LatentAttention
from moetrain.models.latent_options import LatentConfig
from moetrain.models.lora_options import LoraConfig
from moetrain.models.options import AttentionBackend, ModelConfig, QKNorm
from moetrain.models.rope import rope_table
from moetrain.models.rope_options import RopeKind, RopeScaling
from moetrain.models.rules import check_model
from moetrain.moe.routers.topk import TopKOptions
from moetrain.ops.attention import seen_keys

BATCH, SEQ = 2, 7
PLAIN = {"attention": "latent", "num_kv_heads": None, "head_dim": None, "rope_interleaved": True}
SIZES = LatentConfig(q_lora_rank=17, kv_lora_rank=13, qk_nope_head_dim=7, qk_rope_head_dim=6, v_head_dim=5)
YARN = RopeScaling(RopeKind.yarn, 40.0, 5, mscale=0.9, mscale_all_dim=0.707)
CASES: dict[str, dict[str, Any]] = {
    "as V2-Lite": {"latent": replace(SIZES, q_lora_rank=None)},
    "as V3": {"latent": SIZES, "rope_scaling": YARN},
    "halves turn": {"latent": SIZES, "rope_interleaved": False},
    "wide values": {"latent": replace(SIZES, v_head_dim=19, norm_eps=0.3), "rope_scaling": YARN},
}
Seen = Callable[[int, int, int], bool]


def config(case: str, **changes: Any) -> ModelConfig:
    return replace(TINY, **{**PLAIN, **CASES[case], **changes})


def build(cfg: ModelConfig) -> tuple[LatentAttention, Tensor]:
    torch.manual_seed(0)
    attention = LatentAttention(cfg).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(0, 0.4)
    return attention, torch.randn(BATCH, SEQ, cfg.d_model, dtype=torch.float64)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def by_loop(attention: LatentAttention, cfg: ModelConfig, x_BSD: Tensor, seen: Seen) -> Tensor:
    """One query, head and pair of elements at a time; angles by yarn's own table, which other tests hold."""
    m, heads = cfg.latent, cfg.num_heads
    table = rope_table(
        torch.arange(SEQ)[None], m.qk_rope_head_dim, cfg.rope_theta, torch.float64, cfg.rope_scaling
    )
    half = m.qk_rope_head_dim // 2

    def turned(v: Tensor, place: int) -> Tensor:
        out = torch.zeros_like(v)
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if cfg.rope_interleaved else (i, i + half)
            cos, sin = table.cos_BS1H[0, place, 0, i], table.sin_BS1h[0, place, 0, i]
            out[a], out[b] = v[a] * cos - v[b] * sin, v[b] * cos + v[a] * sin
        return out

    if m.q_lora_rank is None:
        q = x_BSD @ attention.w_q_QD.t()
    else:
        latent = rms(x_BSD @ attention.w_q_RD.t(), attention.q_norm.weight_D, m.norm_eps)
        q = latent @ attention.w_q_QR.t()
    q = q.reshape(BATCH, SEQ, heads, -1)
    kv = x_BSD @ attention.w_kv_PD.t()
    latent = rms(kv[..., : m.kv_lora_rank], attention.kv_norm.weight_D, m.norm_eps)
    made = (latent @ attention.w_kv_UL.t()).reshape(BATCH, SEQ, heads, -1)
    still, width = m.qk_nope_head_dim, m.qk_nope_head_dim + m.qk_rope_head_dim
    s = cfg.rope_scaling
    grown = 1.0 if s.mscale_all_dim is None else 0.1 * s.mscale_all_dim * math.log(s.factor) + 1
    y = torch.zeros(BATCH, SEQ, heads, m.v_head_dim, dtype=x_BSD.dtype)
    for b in range(BATCH):
        for n in range(heads):
            k = [torch.cat([made[b, j, n, :still], turned(kv[b, j, -2 * half :], j)]) for j in range(SEQ)]
            for i in range(SEQ):
                query = torch.cat([q[b, i, n, :still], turned(q[b, i, n, still:], i)])
                keys = [j for j in range(SEQ) if seen(b, i, j)]
                scores = torch.stack([query @ k[j] for j in keys]) * grown**2 / width**0.5
                y[b, i, n] = scores.softmax(0) @ made[b, keys, n, still:]
    return y.flatten(2) @ attention.w_out_DO.t()


def run(
    attention: LatentAttention,
    cfg: ModelConfig,
    x: Tensor,
    window: int | None = None,
    docs: Tensor | None = None,
) -> Tensor:
    table = rope_table(
        torch.arange(SEQ)[None], attention.rope_dim, cfg.rope_theta, torch.float64, cfg.rope_scaling
    )
    return attention(x, table, plan_of(cfg, attention.heads, x, seen_keys(SEQ, 0, window, docs)))


@pytest.mark.parametrize("case", CASES)
def test_it_equals_the_loop(case: str) -> None:
    cfg = config(case)
    attention, x = build(cfg)
    x.requires_grad_()
    parts = [x, *attention.parameters()]
    expected, found = by_loop(attention, cfg, x, lambda b, i, j: j <= i), run(attention, cfg, x)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    dy = torch.randn_like(x)
    for ours, theirs in zip(
        torch.autograd.grad(found, parts, dy), torch.autograd.grad(expected, parts, dy), strict=True
    ):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", [AttentionBackend.sdpa, AttentionBackend.blocks])
def test_documents_and_a_window(backend: AttentionBackend) -> None:
    cfg = config("as V3", attention_backend=backend)
    attention, x = build(cfg)
    docs = torch.tensor([[4] * 3 + [9] * 4, [0, 1] * 3 + [2]])
    expected = by_loop(attention, cfg, x, lambda b, i, j: j <= i < j + 3 and bool(docs[b, i] == docs[b, j]))
    torch.testing.assert_close(run(attention, cfg, x, 3, docs), expected, rtol=1e-11, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_the_cache_keeps_the_latent_vector_alone(case: str) -> None:
    cfg = config(case)
    model = decoder(**{**PLAIN, **CASES[case]})
    ids, cache = tokens(2, 9), KVCache(cfg.num_layers, 9)
    parts = [model(part, cache=cache).hidden_BSD for part in ids.split([4, 1, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).hidden_BSD, rtol=1e-11, atol=1e-11)
    kept = [tuple(t.shape) for t in vars(cache.layers[1]).values() if isinstance(t, Tensor)]
    assert kept == [(2, 1, 9, 13), (2, 1, 9, 6)]


def test_low_rank_products_reach_every_matrix() -> None:
    """They start at zero, and a step moves each of them."""
    changes = {**PLAIN, **CASES["as V3"]}
    plain, ours = (
        decoder(**changes),
        decoder(**changes, lora=LoraConfig(rank=2, targets=("*.attention.w_*",))),
    )
    ours.load_state_dict(plain.state_dict(), strict=False)
    ids = tokens(2, 9)
    assert torch.equal(ours(ids).hidden_BSD, plain(ids).hidden_BSD)
    ours(ids).hidden_BSD.square().sum().backward()
    factors = {
        name: p for name, p in ours.named_parameters() if "0.attention.lora" in name and "b_NR" in name
    }
    matrices = [name for name, p in plain.named_parameters() if "0.attention." in name and p.ndim == 2]
    assert len(factors) == len(matrices) == 5
    assert all(p.grad is not None and p.grad.any() for p in factors.values())


def test_counts_by_hand() -> None:
    cfg = config("as V3", vocab_size=41)
    heads, router = cfg.num_heads, TopKOptions(top_k=2)
    matrices = 17 * 23 + heads * 13 * 17 + (13 + 6) * 23 + heads * (7 + 5) * 13 + 23 * heads * 5
    counts = count_parameters(abstract_decoder(cfg, router, None, 41))
    assert counts.attention == cfg.num_layers * matrices
    assert counts.norms == cfg.num_layers * (2 * 23 + 17 + 13) + 23
    flops = flops_breakdown(cfg, router, 7)
    assert flops.projections == 2 * counts.attention
    assert flops.scores == 2 * cfg.num_layers * heads * (13 + 5) * 4  # of 7 keys 4 on average, without zeros


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent": replace(SIZES, qk_rope_head_dim=5)}, "model.latent.qk_rope_head_dim=5 must be even"),
        ({"latent": replace(SIZES, kv_lora_rank=0)}, "model.latent.kv_lora_rank=0 must be 1 or more"),
        ({"attention": "grouped_query", "latent": SIZES, "head_dim": 8},
         "model.latent.q_lora_rank=17 is read by"),
        ({"attention": "grouped_query", "attention_pattern": ("latent", "grouped_query"), "head_dim": 8},
         "latent is of all layers or of none; set model.attention=latent"),
        ({"num_kv_heads": 2}, "model.num_kv_heads=2 does not go with model.attention=latent"),
        ({"head_dim": 8}, "model.head_dim=8 does not go with"),
        ({"qkv_bias": True}, "model.qkv_bias=True does not go with"),
        ({"qk_norm": QKNorm.head}, "model.qk_norm=head does not go with"),
        ({"rope_scaling": replace(YARN, mscale_all_dim=None)}, "mscale=0.9 is not used without"),
        ({"rope_scaling": replace(YARN, attention_factor=1.5)}, "nor beside model.rope_scaling.attention_f"),
        ({"attention": "grouped_query", "latent": LatentConfig(), "head_dim": 8,
          "rope_scaling": replace(YARN, mscale=None)}, "mscale_all_dim=0.707 is not used without"),
        ({"rope_scaling": RopeScaling(RopeKind.linear, 2.0, mscale_all_dim=1.0)}, "is not used by model"),
    ],
)  # fmt: skip
def test_what_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        check_model(config("as V3", **{"rope_scaling": RopeScaling(), **changes}))
    check_model(config("as V3", num_kv_heads=TINY.num_heads))
