"""MultiHash is one network a token, put together from segments that as many hashes of its id pick.

Shapes: T tokens, D model, E experts, K hashes, P = E / K experts a part, F hidden units of an expert.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from router_cases import chosen, normal
from torch import Tensor

from moetrain.moe import MoELayer, Router, RouterContext, build_router

D, F, K, P = 5, 3, 3, 4
IDS = [7, 2, 7, 41, 0, 2, 19, 3, 30_000, 41, 11]


def context(ids: list[int]) -> RouterContext:
    return replace(RouterContext.default(1, len(ids)), token_ids_T=torch.tensor(ids))


def table(router: Router, ids: list[int]) -> list[list[int]]:
    """The experts of each id, asked for one token at a time."""
    return [chosen(router(torch.zeros(1, D), context([i])), 1)[0].nonzero()[:, 0].tolist() for i in ids]


def network(x_D: Tensor, experts: list[int], up_EDF: Tensor, down_EFD: Tensor) -> Tensor:
    """ReLU between one matrix [D, K F], whose columns are the segments', and one [K F, D]."""
    up = torch.cat([up_EDF[e] for e in experts], dim=1)
    down = torch.cat([down_EFD[e] for e in experts], dim=0)
    return torch.relu(x_D @ up) @ down


@pytest.mark.parametrize("training", [True, False])
def test_a_token_gets_one_network_of_the_segments_of_its_id(training: bool) -> None:
    torch.manual_seed(0)
    options = {"router": "multi_hash", "router_options": {"top_k": K}, "activation": "relu"}
    layer = MoELayer(D, F, K * P, **options, backend="loop").double().train(training)
    x = normal(1, 1, len(IDS), D).requires_grad_()
    y, routing = layer(x, context(IDS))
    up, down = layer.experts.w_gate_up_EDCF, layer.experts.w_down_EFD
    experts = table(layer.router, IDS)
    expected = torch.stack([network(x[0, t], experts[t], up[:, :, 0], down) for t in range(len(IDS))])[None]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    cotangent, wanted = normal(2, *y.shape), [x, up, down]
    ours, theirs = (torch.autograd.grad((out * cotangent).sum(), wanted) for out in (y, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert bool((routing.assignment.weights_N == 1).all())
    assert [len({e // P for e in found}) for found in experts] == [K] * len(IDS)  # one of each part


def test_hashes_are_even_and_know_nothing_of_one_another() -> None:
    """Of 6,000 ids each pair of experts of two parts has a ninth: 667, with a deviation of 24."""
    router = build_router("multi_hash", d_model=D, num_experts=6, top_k=2)
    experts_T2 = (
        chosen(router(torch.zeros(6000, D), context([*range(6000)])), 6000).nonzero()[:, 1].view(-1, 2)
    )
    pairs = torch.bincount(experts_T2[:, 0] * 3 + experts_T2[:, 1] - 3, minlength=9)
    assert int(pairs.sum()) == 6000
    assert bool(((pairs - 6000 / 9).abs() < 120).all()), pairs
    other = build_router("multi_hash", d_model=D, num_experts=6, top_k=2, salt=1)
    same = [a == b for a, b in zip(table(router, [*range(300)]), table(other, [*range(300)]), strict=True)]
    assert sum(same) < 60  # about a ninth


def test_one_hash_is_the_hash_router() -> None:
    one = build_router("multi_hash", d_model=D, num_experts=7, top_k=1, salt=5)
    plain = build_router("hash", d_model=D, num_experts=7, top_k=1, salt=5)
    assert table(one, IDS) == table(plain, IDS)


def test_hashes_divide_the_experts() -> None:
    assert [build_router("multi_hash", d_model=D, num_experts=e).top_k for e in (1, 7, 6, 12)] == [1, 1, 3, 4]
    with pytest.raises(ValueError, match=r"router\.top_k=4 hashes must divide num_experts=6: take 3"):
        build_router("multi_hash", d_model=D, num_experts=6, top_k=4)
    with pytest.raises(ValueError, match="router=multi_hash needs token ids"):
        build_router("multi_hash", d_model=D, num_experts=6)(torch.zeros(2, D), RouterContext.default(1, 2))
