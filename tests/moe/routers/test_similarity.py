"""Similarity-aware routing by loops; what it may not see; and generation, which has the tokens before.

Shapes: T tokens, B sequences of S, D model, E experts.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from router_cases import dense_weights, looking_at_logits, normal
from torch import Tensor

from moetrain.models import generate
from moetrain.models.cache import KVCache
from moetrain.models.decoder import Decoder
from moetrain.models.options import ModelConfig
from moetrain.moe import RouterContext, build_router
from moetrain.moe.options import ExpertsConfig
from moetrain.moe.routers import similarity
from moetrain.moe.routers.similarity import SimilarityOptions, SimilarityRouter

D, E, B, S, K = 5, 7, 3, 11, 2
T = B * S


def similar(**options: object) -> SimilarityRouter:
    torch.manual_seed(2)
    router = build_router("similarity", d_model=D, num_experts=E, top_k=K, width=3, **options).double()
    assert isinstance(router, SimilarityRouter)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.mul_(3)
    return router


def context() -> RouterContext:
    doc_ids_T = (torch.arange(T) % S >= 4).long()  # two documents a row
    return replace(RouterContext.default(B, S), valid_T=torch.arange(T) % 5 != 2, doc_ids_T=doc_ids_T)


def weights_by_hand(router: SimilarityRouter, x_TD: Tensor, ctx: RouterContext) -> Tensor:
    """Differentiable [T, E], zero where padded."""
    rows = []
    for i in range(T):
        if not ctx.valid_T[i]:
            rows.append(torch.zeros(E, dtype=torch.float64))
            continue
        query, total, mean_E = router.query_WD @ x_TD[i], 0.0, 0.0
        for j in range(i - i % S, i + 1):
            if ctx.valid_T[j] and (ctx.doc_ids_T is None or ctx.doc_ids_T[i] == ctx.doc_ids_T[j]):
                z_E = router.weight_ED @ x_TD[j]
                like = (query @ (router.key_WD @ x_TD[j]) / math.sqrt(3)).exp()
                total, mean_E = total + like, mean_E + like * z_E.exp() / z_E.exp().sum()
        mean_E = mean_E / total
        best = sorted(range(E), key=lambda e, m=mean_E: -float(m[e].detach()))[:K]
        chosen_E = torch.tensor([e in best for e in range(E)])
        rows.append(mean_E * chosen_E / (mean_E * chosen_E).sum())
    return torch.stack(rows)


@pytest.mark.parametrize("block", [256, 4])
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_scores_are_means_over_like_tokens_before(training, documents, block, monkeypatch):
    monkeypatch.setattr(similarity, "_BLOCK", block)
    router, ctx = similar().train(training), context()
    ctx = ctx if documents else replace(ctx, doc_ids_T=None)
    x_TD, direction_TE = normal(1, T, D).requires_grad_(), normal(3, T, E)
    routing = router(x_TD, ctx)
    routing.check()
    expected_TE = weights_by_hand(router, x_TD, ctx)
    torch.testing.assert_close(dense_weights(routing, T), expected_TE.detach(), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(routing.scores_TE.sum(-1), torch.ones(T, dtype=torch.float64))
    a = routing.assignment
    (a.weights_N * direction_TE[a.token_ids_N, a.expert_ids_N()]).sum().backward()
    leaves = [x_TD, router.weight_ED, router.query_WD, router.key_WD]
    wanted = torch.autograd.grad((expected_TE * direction_TE).sum(), leaves)
    for leaf, theirs in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, theirs, rtol=1e-8, atol=1e-11)


def test_later_tokens_and_other_sequences_have_no_say():
    router, ctx, x_TD = similar(), replace(context(), valid_T=None, doc_ids_T=None), normal(1, T, D)
    before_TE = dense_weights(router(x_TD, ctx), T)
    for changed in range(S, 2 * S):  # of the second sequence
        other_TD = x_TD.clone()
        other_TD[changed] = normal(9, D)
        same_T = (dense_weights(router(other_TD, ctx), T) == before_TE).all(1)
        assert bool(same_T[:changed].all())
        assert bool(same_T[2 * S :].all())
        assert not bool(same_T[changed])


def test_where_each_token_is_like_itself_alone_it_is_top_k():
    x_TD = torch.nn.functional.normalize(normal(1, T, E), dim=-1)
    router = looking_at_logits("similarity", E, top_k=K, width=E, temperature=1e-4)
    with torch.no_grad():
        router.query_WD.copy_(torch.eye(E))
        router.key_WD.copy_(torch.eye(E))
    ctx = RouterContext.default(B, S)
    plain = looking_at_logits("topk", E, top_k=K)(x_TD, ctx)
    torch.testing.assert_close(
        dense_weights(router(x_TD, ctx), T), dense_weights(plain, T), rtol=0, atol=1e-12
    )


def test_generation_routes_as_the_whole_sequence_does():
    """Token by token, with a cache: the router has what it kept of the tokens before."""
    torch.manual_seed(0)
    cfg = ModelConfig(d_model=12, num_layers=2, num_heads=2, d_ff=8, d_ff_expert=6, num_experts=E)
    model = Decoder(cfg, SimilarityOptions(top_k=K, temperature=0.1), ExpertsConfig(), 31).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20)
    ids_BS = torch.randint(0, 31, (1, 13), generator=torch.Generator().manual_seed(1))
    whole = model(ids_BS)
    cache, pieces = KVCache(2, 13), []
    for part in (ids_BS[:, :5], *ids_BS[:, 5:].split(1, 1)):
        pieces.append(model(part, cache=cache))
    hidden_BSD = torch.cat([piece.hidden_BSD for piece in pieces], 1)
    torch.testing.assert_close(hidden_BSD, whole.hidden_BSD, rtol=1e-9, atol=1e-9)
    for layer in (0, 1):
        scores_TE = torch.cat([piece.records[layer].scores_TE for piece in pieces])
        torch.testing.assert_close(scores_TE, whole.records[layer].scores_TE, rtol=1e-9, atol=1e-12)
    assert len(generate(model, [1, 2, 3], 4, temperature=0)) == 4
