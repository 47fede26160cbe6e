"""Gates by domain, by loops: whose router or vector, which experts, and one decision a sequence.

Shapes: T tokens, B sequences of S, D model, E experts, M domains.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from router_cases import dense_weights, normal
from torch import Tensor

from moetrain.models.cache import KVCache
from moetrain.models.decoder import Decoder
from moetrain.models.options import ModelConfig
from moetrain.moe import RouterContext, build_router
from moetrain.moe.options import ExpertsConfig
from moetrain.moe.routers.domain import Decision, DomainOptions, DomainRouter, Gate

D, E, M, B, S = 5, 7, 3, 3, 11
T = B * S
SETS = [[0, 3, 5], [1], [2, 3, 4, 6]]


def gate(**options: object) -> DomainRouter:
    torch.manual_seed(2)
    router = build_router("domain", d_model=D, num_experts=E, domains=M, **options).double()
    assert isinstance(router, DomainRouter)
    with torch.no_grad():
        router.weight_ED.mul_(5)
        if router.domain_ME is not None:
            router.domain_ME.normal_()
    return router


def context() -> RouterContext:
    """Rows of two documents of other domains; ids wrap around; the first token of some is padding."""
    doc_ids_T = (torch.arange(T) % S >= 4).long()
    domain_ids_T = torch.arange(T) // S + 2 * doc_ids_T
    valid_T = torch.arange(T) % 5 != 2
    valid_T[4] = False
    return replace(
        RouterContext.default(B, S), valid_T=valid_T, doc_ids_T=doc_ids_T, domain_ids_T=domain_ids_T
    )


def weights_by_hand(router: DomainRouter, x_TD: Tensor, ctx: RouterContext, top_k: int) -> Tensor:
    options, rows = router.options, []
    for t in range(T):
        row_E, place = torch.zeros(E, dtype=torch.float64), t
        if options.decision is Decision.sequence:
            place = next(
                u for u in range(t - t % S, t + 1)
                if (ctx.valid_T[u] or u == t) and ctx.doc_ids_T[u] == ctx.doc_ids_T[t]
            )  # fmt: skip
        domain = int(ctx.domain_ids_T[t]) % M
        if options.gate is Gate.router:
            z_E = router.weight_ED[domain * E : domain * E + E] @ x_TD[place]
        else:
            z_E = router.weight_ED @ x_TD[place] + router.domain_ME[domain]
        allowed = range(E) if options.experts is None else options.experts[domain]
        best = sorted(allowed, key=lambda e, z=z_E: -float(z[e].detach()))[:top_k]
        chosen_E = torch.tensor([e in best for e in range(E)])
        if ctx.valid_T[t]:
            row_E = z_E.exp() * chosen_E / (z_E.exp() * chosen_E).sum()
        rows.append(row_E)
    return torch.stack(rows)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("experts", [None, SETS])
@pytest.mark.parametrize("decision", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["embedding", "router"])
def test_each_domains_gate(kind, decision, experts, training):
    router = gate(gate=kind, decision=decision, experts=experts, top_k=2).train(training)
    ctx, direction_TE = context(), normal(3, T, E)
    x_TD = normal(1, T, D).requires_grad_()
    routing = router(x_TD, ctx)
    routing.check()
    expected_TE = weights_by_hand(router, x_TD, ctx, 2)
    torch.testing.assert_close(dense_weights(routing, T), expected_TE.detach(), rtol=1e-11, atol=1e-13)
    a = routing.assignment
    (a.weights_N * direction_TE[a.token_ids_N, a.expert_ids_N()]).sum().backward()
    leaves = [x_TD, router.weight_ED, *([] if router.domain_ME is None else [router.domain_ME])]
    wanted = torch.autograd.grad((expected_TE * direction_TE).sum(), leaves)
    for leaf, theirs in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["embedding", "router"])
def test_a_domain_learns_from_its_own_tokens(kind):
    router, x_TD = gate(gate=kind, top_k=2), normal(1, T, D)
    ctx = replace(context(), domain_ids_T=torch.where(torch.arange(T) % 2 == 0, 0, 2))
    router(x_TD, ctx).assignment.weights_N.square().sum().backward()
    of_domains = router.weight_ED.grad.view(M, E, D) if kind == "router" else router.domain_ME.grad
    assert [bool(of_domain.any()) for of_domain in of_domains] == [True, False, True]


def test_without_a_vector_it_is_top_k():
    router, x_TD, ctx = gate(top_k=2), normal(1, T, D), context()
    plain = build_router("topk", d_model=D, num_experts=E, top_k=2).double()
    with torch.no_grad():
        router.domain_ME.zero_()
        plain.weight_ED.copy_(router.weight_ED)
    ours, theirs = (dense_weights(r(x_TD, ctx), T) for r in (router, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)


def test_what_no_domain_is_told_of_is_of_the_unknown_one():
    router, x_TD = gate(top_k=2, unknown=1, experts=SETS), normal(1, T, D)
    untold = router(x_TD, replace(context(), domain_ids_T=None))
    told = router(x_TD, replace(context(), domain_ids_T=torch.ones(T, dtype=torch.int64)))
    assert torch.equal(dense_weights(untold, T), dense_weights(told, T))
    assert untold.demand_E.tolist() == [0, int(untold.num_tokens), 0, 0, 0, 0, 0]


def test_generation_keeps_the_decision_of_the_first_token():
    torch.manual_seed(0)
    cfg = ModelConfig(d_model=12, num_layers=2, num_heads=2, d_ff=8, d_ff_expert=6, num_experts=E)
    options = DomainOptions(top_k=1, decision=Decision.sequence)
    model = Decoder(cfg, options, ExpertsConfig(), 31).double().eval()
    ids_BS = torch.randint(0, 31, (1, 9), generator=torch.Generator().manual_seed(1))
    whole = model(ids_BS)
    assert all(record.demand_E.max() == 9 for record in whole.records.values())
    cache = KVCache(2, 9)
    pieces = [model(part, cache=cache) for part in (ids_BS[:, :3], *ids_BS[:, 3:].split(1, 1))]
    hidden_BSD = torch.cat([piece.hidden_BSD for piece in pieces], 1)
    torch.testing.assert_close(hidden_BSD, whole.hidden_BSD, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": [[0], [1]]}, "router.experts has 2 lists for router.domains=3"),
        ({"experts": [[0], [1], []]}, r"router.experts\[2\]=\[\] must name at least one expert"),
        ({"experts": [[0], [7], [1]]}, r"router.experts\[1\]=\[7\] must name"),
        ({"experts": [[0, 0], [1], [1]]}, r"router.experts\[0\]=\[0, 0\] must name"),
        ({"unknown": 3}, "router.unknown=3 must be below router.domains=3"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        build_router("domain", d_model=D, num_experts=E, domains=M, **options)
