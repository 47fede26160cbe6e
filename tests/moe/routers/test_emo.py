"""EMO's pools: who is in one, by a loop over documents, and the routing within, by the plain top-k router.

Shapes: T tokens, E experts, B sequences of S.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from router_cases import chosen, dense_weights, looking_at_logits, normal
from torch import Tensor

from moetrain.moe import Router, RouterContext, build_router

B, S, E = 3, 13, 11
LENGTHS = [[5, 8], [13], [1, 4, 8]]  # of documents


def context(step: int = 0, padded: bool = False) -> RouterContext:
    docs = [doc for row in LENGTHS for doc, length in enumerate(row) for _ in range(length)]
    valid_T = torch.arange(B * S) % 4 != 3 if padded else None
    ids_B = torch.tensor([3, 17, 4])
    return RouterContext(B, S, ids_B, valid_T=valid_T, seed=2, step=step, doc_ids_T=torch.tensor(docs))


def spans() -> list[range]:
    """The tokens of each document."""
    return [
        range(row * S + sum(lengths[:i]), row * S + sum(lengths[: i + 1]))
        for row, lengths in enumerate(LENGTHS)
        for i in range(len(lengths))
    ]


def emo(**options: object) -> Router:
    return looking_at_logits("emo", E, top_k=2, **options)


def pool_of(logits_TE: Tensor, span: range, size: int, ctx: RouterContext) -> list[int]:
    """The experts of the largest summed probabilities, by a loop; ties to the lower expert."""
    sums = [0.0] * E
    for t in span:
        if ctx.valid_T is None or bool(ctx.valid_T[t]):
            exps = [float(z.exp()) for z in logits_TE[t]]
            sums = [s + x / sum(exps) for s, x in zip(sums, exps, strict=True)]
    return sorted(range(E), key=lambda e: (-sums[e], e))[:size]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_a_document_chooses_within_the_pool_that_it_prefers(padded: bool, training: bool) -> None:
    router, ctx, logits_TE = (
        emo(min_pool=4, max_pool=4, eval_pool=4),
        context(padded=padded),
        normal(0, B * S, E),
    )
    router.train(training).eval_mode = "pool"
    z_TE = logits_TE.clone().requires_grad_()
    routing = router(z_TE, ctx)
    found_TE = dense_weights(routing, B * S)
    right = torch.zeros(B * S, E, dtype=torch.float64)
    hand_TE = logits_TE.clone().requires_grad_()
    for span in spans():
        pool = pool_of(logits_TE, span, 4, ctx)
        for t in span:
            if ctx.valid_T is not None and not bool(ctx.valid_T[t]):
                continue
            p = {e: hand_TE[t, e].exp() / sum(hand_TE[t, o].exp() for o in pool) for e in pool}
            for e in sorted(pool, key=lambda e: -float(p[e].detach()))[:2]:
                right = right.index_put((torch.tensor(t), torch.tensor(e)), p[e])
    torch.testing.assert_close(found_TE, right.detach(), rtol=0, atol=1e-14)
    probe_TE = normal(3, B * S, E)
    a = routing.assignment
    (grad_TE,) = torch.autograd.grad((a.weights_N * probe_TE[a.token_ids_N, a.expert_ids_N()]).sum(), z_TE)
    (hand_grad_TE,) = torch.autograd.grad((right * probe_TE).sum(), hand_TE)
    torch.testing.assert_close(grad_TE, hand_grad_TE, rtol=0, atol=1e-13)
    assert float(grad_TE.abs().max()) > 1e-3
    routing.check()


def test_a_pool_of_all_is_the_plain_router() -> None:
    ctx, logits_TE = context(), normal(1, B * S, E)
    plain = looking_at_logits("topk", E, top_k=2, renormalize=False)(logits_TE, ctx)
    pooled = emo(min_pool=E, max_pool=E)(logits_TE, ctx)
    evaluated = emo(min_pool=2, max_pool=2).eval()(logits_TE, ctx)
    for routing in (pooled, evaluated):
        assert torch.equal(chosen(routing, B * S), chosen(plain, B * S))
        torch.testing.assert_close(
            dense_weights(routing, B * S), dense_weights(plain, B * S), rtol=0, atol=1e-15
        )


def test_two_documents_of_one_sequence_have_two_pools() -> None:
    logits_TE = torch.zeros(B * S, E, dtype=torch.float64)
    for n, span in enumerate(spans()):
        logits_TE[span.start : span.stop, [n % E, (n + 1) % E, (n + 2) % E]] = 3.0
    logits_TE += 0.01 * normal(2, B * S, E)
    routing = emo(min_pool=3, max_pool=3)(logits_TE, context())
    used = [
        set(chosen(routing, B * S)[span.start : span.stop].any(0).nonzero().flatten().tolist())
        for span in spans()
    ]
    for n, experts in enumerate(used):
        assert experts <= {n % E, (n + 1) % E, (n + 2) % E}
    one = emo(min_pool=3, max_pool=3)(logits_TE, replace(context(), doc_ids_T=None))  # a sequence is one then
    assert len(set(chosen(one, B * S)[:S].any(0).nonzero().flatten().tolist())) <= 3
    assert not torch.equal(chosen(one, B * S), chosen(routing, B * S))


def sizes(router: Router, ctx: RouterContext) -> list[int]:
    """Experts that a document's logits leave finite."""
    routing = router(normal(4, ctx.batch * ctx.seq, E), ctx)
    assert routing.logits_TE is not None
    finite_TE = routing.logits_TE.isfinite()
    return [int(finite_TE[span.start].sum()) for span in spans()]


def test_sizes_are_drawn_evenly_from_both_ends_and_by_the_document_alone() -> None:
    router = emo(min_pool=2, max_pool=5)
    drawn = [n for step in range(200) for n in sizes(router, context(step))]
    counts = Counter(drawn)
    assert set(counts) == {2, 3, 4, 5}
    expected = len(drawn) / 4
    assert sum((c - expected) ** 2 / expected for c in counts.values()) < 16.3  # chi square, 3 degrees, 0.1 %
    ctx = context(7)
    whole = router(normal(4, B * S, E), ctx).logits_TE
    assert ctx.doc_ids_T is not None
    assert whole is not None
    for b in range(B):  # the same alone as in a batch, so on every layout
        rows = slice(b * S, b * S + S)
        mine = replace(ctx, batch=1, sample_ids_B=ctx.sample_ids_B[b : b + 1], doc_ids_T=ctx.doc_ids_T[rows])
        assert torch.equal(router(normal(4, B * S, E)[rows], mine).logits_TE, whole[rows])
    assert set(sizes(router.eval(), context())) == {E}


def test_a_layer_without_tokens_and_one_with_padding_alone() -> None:
    router = emo(min_pool=3, max_pool=3)
    nothing = RouterContext(2, 0, torch.arange(2))
    assert router(normal(0, 0, E), nothing).assignment.token_ids_N.numel() == 0
    padding = replace(context(), valid_T=torch.zeros(B * S, dtype=torch.bool))
    assert router(normal(0, B * S, E), padding).assignment.token_ids_N.numel() == 0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"min_pool": 1}, r"router\.min_pool=1 and router\.max_pool=11 must lie in this order between"),
        ({"min_pool": 5, "max_pool": 4}, r"router\.min_pool=5 and router\.max_pool=4"),
        ({"max_pool": 12}, r"router\.max_pool=12 must lie in this order"),
        ({"eval_pool": 1}, r"router\.eval_pool=1 must lie between router\.top_k=2 and num_experts=11"),
    ],
)
def test_pools_that_cannot_be_are_refused(options: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        build_router("emo", d_model=4, num_experts=E, top_k=2, **options)


def test_the_papers_numbers_are_the_defaults() -> None:
    router = build_router("emo", d_model=4, num_experts=128, top_k=8)
    assert (router.min_pool, router.max_pool, router.eval_pool) == (8, 128, 32)
