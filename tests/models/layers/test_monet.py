"""Monet against the sum over all n^2 experts, one at a time; its choice of parts; layers that share a router.

Shapes: B batch, S sequence, T tokens, D model, n parts of a side, H heads, M hidden units of an expert.
"""

from __future__ import annotations

from itertools import product
from statistics import NormalDist

import pytest
import torch
from layer_cases import inputs, layer, layer_decoder
from model_cases import tokens
from torch import Tensor, nn

from moetrain.models.layer_options import Decomposition, MonetConfig
from moetrain.moe import RouterContext

HORIZONTAL, VERTICAL = Decomposition.horizontal, Decomposition.vertical


def gates_by_hand(x_D: Tensor, made: nn.Module, top_k: int) -> tuple[list[list[Tensor]], int]:
    """([side][head] gates, how many parts stay); the threshold is the standard library's."""
    router = made.router
    n, heads, stay = router.n, router.heads, 0
    sigma = NormalDist().inv_cdf(1 - top_k / n) if top_k < n else float("-inf")
    gates: list[list[Tensor]] = []
    for side in range(2):
        gates.append([])
        for head in range(heads):
            at = (side * heads + head) * n
            z = [router.weight_ED[at + i] @ x_D for i in range(n)]
            mean, variance = (b[side * heads + head] for b in (router.norm.mean_X, router.norm.variance_X))
            normed = [(value - mean) / (variance + 1e-5).sqrt() for value in z]
            least = min(max(value.item() for value in normed), sigma)
            kept = [value.item() >= least for value in normed]
            total = sum(value.exp() for value, keep in zip(z, kept, strict=True) if keep)
            parts = [
                value.exp() / total if keep else torch.zeros((), dtype=x_D.dtype)
                for value, keep in zip(z, kept, strict=True)
            ]
            gates[side].append(torch.stack(parts))
            stay += sum(kept)
    return gates, stay


def expert(x_D: Tensor, e: nn.Module, i: int, j: int, kind: Decomposition) -> Tensor:
    """The output of expert (i, j) alone."""

    def unit(w: Tensor, b: Tensor, at: int) -> Tensor:
        width = len(w) // e.n
        rows = slice(at * width, (at + 1) * width)
        return torch.relu(w[rows] @ x_D + b[rows]) ** 2

    def out(w: Tensor, hidden: Tensor, at: int) -> Tensor:
        return w[:, at * len(hidden) : (at + 1) * len(hidden)] @ hidden

    if kind is HORIZONTAL:
        return out(e.w_down, unit(e.w_up, e.b_up, i), j) + e.bias_nD[j]
    first, second = unit(e.w_up_1, e.b_up_1, i), unit(e.w_up_2, e.b_up_2, j)
    left = out(e.w_down_11, first, i) + out(e.w_down_12, second, i) + e.bias_nL[i]
    right = out(e.w_down_21, first, j) + out(e.w_down_22, second, j) + e.bias_nR[j]
    return torch.cat([left, right])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("top_k", "heads"), [(2, 3), (1, 1), (5, 2)])
@pytest.mark.parametrize("kind", [HORIZONTAL, VERTICAL])
def test_output_and_gradients_are_the_sum_over_all_experts(
    kind: Decomposition, top_k: int, heads: int, training: bool
) -> None:
    options = MonetConfig(kind, heads, top_k)
    made = layer("monet", monet=options, num_experts=25, d_ff_expert=5).train(training)
    x = inputs(2, 3)
    y, record = made(x)
    expected, stayed = [], 0
    for x_D in x.flatten(0, 1):
        (g1, g2), stay = gates_by_hand(x_D, made, top_k)
        stayed += stay
        expected.append(
            sum(
                sum(g1[h][i] * g2[h][j] for h in range(heads)) * expert(x_D, made.experts, i, j, kind)
                for i, j in product(range(5), range(5))
            )
        )
    whole = torch.stack(expected).view_as(x)
    torch.testing.assert_close(y, whole, rtol=1e-12, atol=1e-12)
    assert int(record.demand_E.sum()) == stayed
    direction, wanted = torch.randn_like(y), [x, *made.parameters()]
    ours = torch.autograd.grad((y * direction).sum(), wanted)
    theirs = torch.autograd.grad((whole * direction).sum(), wanted, materialize_grads=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", [HORIZONTAL, VERTICAL])
def test_parameters_grow_with_the_root_of_the_experts(kind: Decomposition) -> None:
    def size(n: int) -> int:
        made = layer("monet", monet=MonetConfig(kind, 2, 2), num_experts=n * n, d_ff_expert=4)
        return sum(parameter.numel() for parameter in made.parameters())

    assert size(12) == 2 * size(6)


def test_of_normal_scores_k_stay_on_average_and_always_the_best() -> None:
    made = layer("monet", monet=MonetConfig(VERTICAL, 2, 8), num_experts=64 * 64).eval()
    router = made.router
    router.norm.mean_X.zero_()
    with torch.no_grad():  # scores of unit variance
        router.weight_ED.normal_()
    x = torch.nn.functional.normalize(torch.randn(400, 23, dtype=torch.float64), dim=-1)
    router.norm.variance_X.fill_(1.0)
    record = router(x, RouterContext.default(4, 100))
    assert float(record.demand_BE.sum()) / (400 * 4) == pytest.approx(8, rel=0.05)
    router.norm.variance_X.fill_(1e6)  # nobody is near the threshold
    record = router(x, RouterContext.default(4, 100))
    assert int(record.demand_BE.sum()) == 400 * 4
    best = (x @ router.weight_ED.T).view(400, 4, 64).argmax(-1)
    assert torch.equal(record.gates_TE.view(400, 4, 64).argmax(-1), best)


def test_statistics_are_batch_norms_over_tokens_and_parts() -> None:
    made = layer("monet", monet=MonetConfig(VERTICAL, 3, 2, norm_momentum=1.0), num_experts=49)
    router, x = made.router, inputs(2, 5).flatten(0, 1).detach()
    valid = torch.tensor([True, True, False, True, False] * 2)
    record = router(x, RouterContext(2, 5, torch.arange(2), valid_T=valid))
    assert not record.demand_BE.sum(1).eq(router(x, RouterContext.default(2, 5)).demand_BE.sum(1)).any()
    router.after_step(record.stats)
    scores = (x @ router.weight_ED.T).view(10, 6, 7)[valid].transpose(1, 2).reshape(-1, 6)
    reference = nn.BatchNorm1d(6, affine=False, momentum=1.0).double()
    reference(scores)
    torch.testing.assert_close(router.norm.mean_X, reference.running_mean)
    rows = len(scores)
    torch.testing.assert_close(router.norm.variance_X, reference.running_var * (rows - 1) / rows)


def test_layers_share_the_router_of_the_first_of_them() -> None:
    model = layer_decoder("monet", num_layers=7, first_dense=1, monet=MonetConfig(VERTICAL, 2, 2, share=3))
    assert list(model.routers()) == [1, 4]
    gates: dict[int, Tensor] = {}
    for place, block in enumerate(model.blocks):
        if place:
            block.feed_forward.experts.register_forward_pre_hook(
                lambda module, args, place=place: gates.update({place: args[1]})
            )
    assert list(model(tokens(2, 5)).records) == [1, 4]
    assert torch.equal(gates[1], gates[2])
    assert torch.equal(gates[1], gates[3])
    assert torch.equal(gates[4], gates[6])
    assert not torch.equal(gates[1], gates[4])


def test_a_shared_routers_gradient_comes_from_every_layer() -> None:
    """Against the same layers with copies of the router: the sum of the copies' gradients."""
    one = layer_decoder("monet", num_layers=2, monet=MonetConfig(VERTICAL, 2, 2, share=2))
    ids = tokens(2, 5)
    leader, follower = (block.feed_forward for block in one.blocks)
    out = one(ids).hidden_BSD
    (ours,) = torch.autograd.grad(out.square().sum(), [leader.router.weight_ED])
    detached: list[Tensor] = []

    def cut(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0], args[1].detach(), args[2].detach()

    for other in (leader, follower):
        hook = other.experts.register_forward_pre_hook(cut)
        (part,) = torch.autograd.grad(one(ids).hidden_BSD.square().sum(), [leader.router.weight_ED])
        hook.remove()
        detached.append(part)
    torch.testing.assert_close(sum(detached), ours, rtol=1e-10, atol=1e-10)
    assert all(part.any() for part in detached)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_experts": 50}, r"model\.num_experts=50 must be a square.*take 49 or 64"),
        ({"monet": MonetConfig(top_k=8)}, r"model\.monet\.top_k=8 exceeds the 7 parts"),
        ({"d_ff_expert": 1}, r"model\.d_ff_expert=1 has no halves"),
    ],
)
def test_what_monet_refuses(changes: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        layer("monet", **changes)
