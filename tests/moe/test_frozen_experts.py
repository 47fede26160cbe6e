"""The first experts of a layer stay to the bit, whatever optimizer trains the others.

Shapes: T tokens, D model, E experts, F hidden.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_cases import layer
from model_cases import TINY, VOCAB, tokens
from router_cases import normal
from torch import Tensor

from moetrain.models import Decoder, cross_entropy_sum
from moetrain.moe import MoELayer
from moetrain.moe.options import Backend, ExpertsConfig
from moetrain.moe.routers.topk import TopKOptions
from moetrain.train.optim.build import build_optimizer
from moetrain.train.optim.options import AdamWConfig, MuonConfig, OptimConfig

D, F, E, T = 5, 3, 7, 29
NAMES = ("experts.w_gate_up_EDCF", "experts.w_down_EFD")


def gradients(frozen: int, training: bool = True, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(2)
    made = MoELayer(D, F, E, frozen=frozen, **options).double().train(training)
    y_BSD, _ = made(normal(1, 1, T, D))
    (y_BSD * normal(2, 1, T, D)).sum().backward()
    return {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("frozen", "options", "first"),
    [
        (3, {"backend": "loop"}, 3),
        (3, {"backend": "cpu", "max_rows_per_rank": 8}, 3),
        (3, {"backend": "torch", "dropout": 0.3}, 3),
        (E, {"backend": "loop"}, E),
        (2, {"expert_widths": (4, 6, 2, 2, 4, 6, 2), "backend": "loop"}, 5),  # slices of two units
    ],
)
def test_gradients_are_zero_there_and_unchanged_elsewhere(
    frozen: int, options: dict[str, Any], first: int, training: bool
) -> None:
    free, held = gradients(0, training, **options), gradients(frozen, training, **options)
    assert free.keys() == held.keys()
    for name, gradient in free.items():
        if name in NAMES:
            assert bool(gradient[:first].any())
            assert not held[name][:first].any()
            assert torch.equal(held[name][first:], gradient[first:])
        else:
            assert torch.equal(held[name], gradient)


@pytest.mark.parametrize("name", ["moe_x", "avg_k"])
def test_routers_that_read_experts_do_not_move_them(name: str) -> None:
    made = layer(name)
    made.experts.frozen = 2
    _, routing = made(normal(3, 2, 7, TINY.d_model))
    (gradient,) = torch.autograd.grad(routing.logits_TE.square().sum(), made.experts.w_gate_up_EDCF)
    assert not gradient[:2].any()
    assert bool(gradient[2:].flatten(1).any(1).all())


@pytest.mark.parametrize("optim", [AdamWConfig(weight_decay=0.5), MuonConfig(weight_decay=0.5)])
def test_an_optimizer_that_decays_moves_no_bit(optim: OptimConfig) -> None:
    torch.manual_seed(0)
    experts = ExpertsConfig(backend=Backend.loop, frozen=3)
    model = Decoder(TINY, TopKOptions(), experts, VOCAB).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, optim)
    for step in range(3):
        ids = tokens(2, 13, seed=step)
        out = model(ids)
        total, _ = cross_entropy_sum(out.hidden_BSD[:, :-1], model.head_weight, ids[:, 1:])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    for name, p in model.named_parameters():
        if name.endswith(NAMES):
            assert torch.equal(p[:3], before[name][:3]), name
            assert bool((p[3:] != before[name][3:]).any()), name
        else:
            assert not torch.equal(p, before[name]), name


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"experts\.frozen=8 must lie between 0 and the layer's 7 experts"):
        MoELayer(D, F, E, frozen=8)
    with pytest.raises(ValueError, match=r"experts\.frozen=2 is of experts without biases"):
        MoELayer(D, F, E, frozen=2, bias=True)
