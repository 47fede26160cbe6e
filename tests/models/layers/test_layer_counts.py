"""Parameters and operations of layers without a dispatch: by hand, and by a counter that watches products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layer_cases import LAYERS, layer, layer_decoder
from model_cases import TINY
from torch.utils.flop_counter import FlopCounterMode

from moetrain.models import count_parameters
from moetrain.models.count import flops_breakdown
from moetrain.models.layer_options import Decomposition, MonetConfig
from moetrain.models.options import ModelConfig
from moetrain.moe import RouterContext
from moetrain.moe.options import ExpertsConfig, RouterConfig

D, F, E, N = TINY.d_model, TINY.d_ff_expert, TINY.num_experts, 49
# name -> parameters of one layer's experts, and those that a token passes through
EXPERTS = {
    "peer": (2 * N * D, round(2 * N * D * 15 / 49)),
    "pkm": (N * D, round(N * D * 15 / 49)),
    "moe_x": (2 * E * D * F, 2 * 2 * D * F),
    "s2moe": (3 * E * D * F, 2 * 3 * D * F),
    "avg_k": (2 * E * D * F, 2 * 2 * D * F),
    "smear": (3 * E * D * F, 3 * D * F),
    "meo": (2 * E * D * F, 2 * D * F),
}
# products of experts that pad their rows, and of what is not their router
PADDED = {"moe_x": 2 * 2 * D * F, "avg_k": 2 * 2 * D * F, "s2moe": 2 * 3 * D * F + D}
HALF, REST = 7 * 7, 7 * 6  # 7 parts of 13 hidden units: 7 of the first side and 6 of the second
EXPERTS["monet"] = (2 * (HALF + REST) * D + 7 * D,) * 2


@pytest.mark.parametrize("name", LAYERS)
def test_parameters_by_hand(name: str) -> None:
    model = layer_decoder(name)
    counts = count_parameters(model)
    total, active = EXPERTS[name]
    assert counts.experts == TINY.num_layers * total
    assert counts.experts_active == pytest.approx(TINY.num_layers * active, abs=TINY.num_layers)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    assert counts.total - counts.active == counts.experts - counts.experts_active


@pytest.mark.parametrize("name", [*LAYERS, "monet horizontal"])
def test_operations_are_the_products_that_run(name: str) -> None:
    """Of one layer in evaluation, on whole segments; vectors are counted with a router and are no product."""
    name, _, horizontal = name.partition(" ")
    keys, activation = LAYERS[name]
    if horizontal:
        keys = keys | {"monet": MonetConfig(Decomposition.horizontal, heads=3, top_k=2)}
    made = layer(name, **keys).eval()
    x = torch.randn(2, 12, D, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if name in PADDED:
            ctx = made.of_router(RouterContext.default(2, 12))
            made.router(x.flatten(0, 1), ctx)
        else:
            made(x)
    cfg = replace(TINY, feed_forward=name, num_layers=1, **keys)
    assert isinstance(cfg, ModelConfig)
    flops = flops_breakdown(cfg, RouterConfig(), 12, 11, ExpertsConfig(activation=activation))
    vectors = sum(p.numel() for n, p in made.named_parameters() if p.ndim == 1 and "router" in n)
    expected = flops.experts + flops.router + flops.dense - 2 * vectors
    expected -= 2 * PADDED.get(name, 0)
    assert counter.get_total_flops() / 24 == pytest.approx(expected, rel=1e-3)
