"""CompeteSMoE's two versions: experts win tokens by their outputs, against a loop over tokens and experts.

Shapes: T tokens, D model, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from router_cases import dense_weights, normal
from torch import Tensor

from moetrain.moe import MoELayer, RouterContext
from moetrain.moe.competition import SPAN, competes

B, S, D, F, E, K = 2, 5, 7, 3, 5, 3
V2, V1 = "competesmoe", "competesmoe_v1"


def layer_of(name: str, **more: object) -> MoELayer:
    torch.manual_seed(7)
    options = {"top_k": K, "rate": 1.0} | more
    layer = MoELayer(D, F, E, router=name, router_options=options, backend="loop").double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.6, generator=torch.Generator().manual_seed(parameter.numel()))
    return layer


def context(padded: bool = False) -> RouterContext:
    valid_T = torch.tensor([True] * 7 + [False] * 3) if padded else None
    return replace(RouterContext.default(B, S), valid_T=valid_T, seed=3, step=4, layer=1)


def output(layer: MoELayer, expert: int, x_D: Tensor) -> Tensor:
    """One expert's output for one token, without the layer's operators."""
    gate_DF, up_DF = layer.experts.w_gate_up_EDCF[expert].unbind(1)
    gate_F = x_D @ gate_DF
    return (gate_F / (1 + torch.exp(-gate_F)) * (x_D @ up_DF)) @ layer.experts.w_down_EFD[expert]


def cosine(one_D: Tensor, other_D: Tensor) -> Tensor:
    return one_D @ other_D / (one_D @ one_D).sqrt() / (other_D @ other_D).sqrt()


def by_hand(
    name: str, layer: MoELayer, x_TD: Tensor, valid: list[bool]
) -> tuple[Tensor, Tensor, list[set[int]]]:
    """(y [T, D], the penalty, each token's winners)."""
    rows, penalties, winners = [], [], []
    for x_D, is_valid in zip(x_TD, valid, strict=True):
        if not is_valid:
            rows.append(0 * x_D)
            winners.append(set())
            continue
        outs = [output(layer, e, x_D) for e in range(E)]
        if name == V2:
            claims = torch.stack([torch.log1p(torch.exp(out_D)).sum() / D for out_D in outs])
        else:
            claims = torch.stack([(out_D @ out_D).sqrt() for out_D in outs])
        best = claims.argsort(descending=True)[:K].tolist()
        winners.append(set(best))
        forecast = [z.exp() for z in layer.router.weight_ED @ x_D]
        forecast = [z / sum(forecast) for z in forecast]
        if name == V2:
            weights = [claims[e] / sum(claims[e] for e in best) for e in best]
            truth = list((claims.exp() / claims.exp().sum()).detach())
            off = [(f - t) ** 2 for f, t in zip(forecast, truth, strict=True)]
            alike = sum(cosine(outs[i], outs[j]) for i in best for j in best if i != j)
            penalties.append(sum(off) / E + 0.1 * sum(off[e] for e in best) / K + 2.0 * alike / K**2)
        else:
            weights = [claims[e].exp() / sum(claims[e].exp() for e in best) for e in best]
            truth = [dict(zip(best, weights, strict=True)).get(e, 0 * claims[0]) for e in range(E)]
            penalties.append(sum((f - t) ** 2 for f, t in zip(forecast, truth, strict=True)) / E)
        rows.append(sum(w * outs[e] for w, e in zip(weights, best, strict=True)))
    return torch.stack(rows), sum(penalties) / len(penalties), winners


@pytest.mark.parametrize("bound", [None, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [V2, V1])
def test_a_competition_is_the_loop_forward_and_gradient(name, padded, bound):
    layer = layer_of(name, **({"diversity_coef": 2.0} if name == V2 else {}))
    layer.max_rows_per_rank = bound
    ctx, x_BSD = context(padded), normal(5, B, S, D).requires_grad_()
    cotangent_BSD = normal(6, B, S, D)
    inputs = [x_BSD, *layer.parameters()]
    y_BSD, routing = layer(x_BSD, ctx)
    ours = torch.autograd.grad((y_BSD * cotangent_BSD).sum() + 3 * routing.penalty, inputs)
    valid = [True] * B * S if ctx.valid_T is None else ctx.valid_T.tolist()
    y_TD, penalty, winners = by_hand(name, layer, x_BSD.reshape(-1, D), valid)
    theirs = torch.autograd.grad((y_TD * cotangent_BSD.view(-1, D)).sum() + 3 * penalty, inputs)
    torch.testing.assert_close(y_BSD.view(-1, D), y_TD, rtol=0, atol=1e-11)
    torch.testing.assert_close(routing.penalty, penalty, rtol=0, atol=1e-12)
    for mine, hand in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, hand, rtol=0, atol=1e-10)
    weights_TE = dense_weights(routing, B * S)
    assert [set(row.nonzero().flatten().tolist()) for row in weights_TE] == winners
    assert len({frozenset(won) for won in winners}) > 2


@pytest.mark.parametrize("name", [V2, V1])
def test_scores_of_a_competition_are_the_affinities_shares(name):
    """They carry the gradient of a balance loss to all experts."""
    layer = layer_of(name)
    x_BSD = normal(5, B, S, D)
    _, routing = layer(x_BSD, context())
    outs_TED = torch.stack(
        [torch.stack([output(layer, e, x_D) for e in range(E)]) for x_D in x_BSD.view(-1, D)]
    )
    claims_TE = (outs_TED.exp() + 1).log().mean(-1) if name == V2 else outs_TED.square().sum(-1).sqrt()
    torch.testing.assert_close(routing.scores_TE, claims_TE.softmax(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(routing.logits_TE, x_BSD.view(-1, D) @ layer.router.weight_ED.t())
    weight_TE = normal(8, B * S, E)
    (ours,) = torch.autograd.grad((routing.scores_TE * weight_TE).sum(), layer.experts.w_down_EFD)
    (hand,) = torch.autograd.grad((claims_TE.softmax(-1) * weight_TE).sum(), layer.experts.w_down_EFD)
    torch.testing.assert_close(ours, hand, rtol=0, atol=1e-11)
    assert (ours.flatten(1).norm(dim=1) > 1e-3).all()


@pytest.mark.parametrize("name", [V2, V1])
def test_elsewhere_and_in_evaluation_the_router_routes(name):
    layer, x_BSD = layer_of(name, rate=0.0), normal(5, B, S, D)
    x_TD, logits_TE = x_BSD.view(-1, D), x_BSD.view(-1, D) @ layer.router.weight_ED.t()
    wanted_TE = torch.full_like(logits_TE, -torch.inf)
    for t, row_E in enumerate(logits_TE.tolist()):
        for e in sorted(range(E), key=lambda e: -row_E[e])[:K]:
            wanted_TE[t, e] = row_E[e]
    wanted_TE = wanted_TE.softmax(-1)
    y_TD = sum(wanted_TE[:, e, None] * torch.stack([output(layer, e, x_D) for x_D in x_TD]) for e in range(E))
    compete = layer_of(name)
    for asked in (layer, layer.eval(), compete.eval()):
        y_BSD, routing = asked(x_BSD, context())
        torch.testing.assert_close(y_BSD.view(-1, D), y_TD.detach(), rtol=0, atol=1e-11)
        torch.testing.assert_close(routing.scores_TE, logits_TE.softmax(-1))
        assert routing.penalty == 0
    assert not torch.allclose(compete.train()(x_BSD, context())[0].view(-1, D), y_TD)


def test_a_router_that_foresees_the_outcome_pays_nothing():
    """Its logits are the affinities."""
    layer = layer_of(V2, diversity_coef=0.0)
    x_BSD = torch.eye(D, dtype=torch.float64)[None]
    ctx = RouterContext.default(1, D)
    scores_TE = layer(x_BSD, ctx)[1].scores_TE.detach()
    assert layer(x_BSD, ctx)[1].penalty > 1e-3
    with torch.no_grad():
        layer.router.weight_ED.copy_(scores_TE.log().t())
    assert layer(x_BSD, ctx)[1].penalty < 1e-28


def test_an_output_of_zeros_has_no_direction_and_no_nan():
    layer = layer_of(V2)
    with torch.no_grad():
        layer.experts.w_down_EFD[:3] = 0
    x_BSD = normal(5, B, S, D)
    y_BSD, routing = layer(x_BSD, context())
    penalty = by_hand_of_zeros(layer, x_BSD.view(-1, D), routing.assignment.token_ids_N.new_tensor(range(E)))
    torch.testing.assert_close(routing.penalty, penalty, rtol=0, atol=1e-12)
    (y_BSD.sum() + routing.penalty).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def by_hand_of_zeros(layer: MoELayer, x_TD: Tensor, experts: Tensor) -> Tensor:
    """The penalty with cosines of 0 where an output is 0."""
    total = torch.zeros((), dtype=torch.float64)
    for x_D in x_TD:
        outs = [output(layer, int(e), x_D) for e in experts]
        claims_E = torch.stack([(out_D.exp() + 1).log().mean() for out_D in outs])
        best = claims_E.argsort(descending=True)[:K].tolist()
        off_E = ((layer.router.weight_ED @ x_D).softmax(0) - claims_E.softmax(0)).square()
        total = total + off_E.mean() + 0.1 * off_E[best].mean()
        pairs = [(i, j) for i in best for j in best if i != j and outs[i].any() and outs[j].any()]
        total = total + sum(cosine(outs[i], outs[j]) for i, j in pairs) / K**2
    return total / len(x_TD)


def schedule(layers: int, rate: float, most: int | None, steps: int, warmup: int = 0) -> list[list[bool]]:
    ctx = replace(RouterContext.default(1, 1), seed=5, moe_layers=tuple(range(1, 2 * layers, 2)))
    return [
        [competes(replace(ctx, step=step, layer=layer), rate, most, warmup) for layer in ctx.moe_layers]
        for step in range(steps)
    ]


def test_the_schedule_keeps_its_rate_and_its_bound():
    free, bound = (schedule(9, 0.3, most, 3 * SPAN) for most in (None, 3))
    assert max(map(sum, free)) > 3 >= max(map(sum, bound))
    layers = list(zip(*free, strict=True))
    assert all(abs(sum(steps) / (3 * SPAN) - 0.3) < 5 * (0.21 / (3 * SPAN)) ** 0.5 for steps in layers)
    assert len(set(layers)) == 9
    # nothing is lost: a layer moves to another step
    assert [sum(steps) for steps in zip(*bound, strict=True)] == [sum(steps) for steps in layers]
    assert [row[:3] for row in bound] == [row[:3] for row in free]


def test_the_schedule_begins_after_the_warm_up_and_has_no_state():
    late = schedule(2, 0.5, 1, 40, warmup=13)
    assert not any(map(any, late[:13]))
    assert late[13:] == schedule(2, 0.5, 1, 27)
    assert schedule(2, 1.0, None, 9) == [[True, True]] * 9
    alone = replace(RouterContext.default(1, 1), step=3, layer=4)
    assert competes(alone, 1.0, 1, 0)


def test_a_competition_sees_the_dropout_that_its_winners_have():
    """One number is asked of what is then computed: with one winner of one expert, its weight is 1."""
    torch.manual_seed(7)
    options = {"top_k": 1, "rate": 1.0}
    layer = MoELayer(D, 64, 1, router=V1, router_options=options, backend="loop", dropout=0.5).double()
    heard = []
    layer.router.register_forward_hook(lambda router, given, out: heard.append(given[1].responses_TE))
    y_BSD, _ = layer(normal(5, B, S, D), context())
    torch.testing.assert_close(y_BSD.view(-1, D).norm(dim=1), heard[0][:, 0])
    again_BSD, _ = layer.eval()(normal(5, B, S, D), context())
    assert heard[1] is None
    assert not torch.allclose(again_BSD, y_BSD)


def test_experts_in_slices_are_refused():
    with pytest.raises(ValueError, match=r"router=competesmoe compares .*leave model\.expert_widths out"):
        MoELayer(D, 9, 2, router=V2, expert_widths=(3, 9))
