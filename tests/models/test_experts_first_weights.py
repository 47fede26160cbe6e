"""What experts' networks begin with: as the model around them, as parts of one, or small."""

from __future__ import annotations

import pytest
import torch

from moetrain.config.hydra.compose import compose_train
from moetrain.models.decoder import Decoder
from moetrain.moe import build_router

MODEL = [
    *("model.d_model=53", "model.num_layers=2", "model.num_heads=1", "model.head_dim=4", "model.d_ff=31"),
    *(
        "model.d_ff_expert=37",
        "model.num_experts=7",
        "model.num_shared_experts=1",
        "model.first_dense=1",
        "model.init_std=0.02",
    ),
]


def decoder(*overrides: str) -> Decoder:
    cfg = compose_train([*MODEL, *overrides])
    torch.manual_seed(0)
    return Decoder(cfg.model, cfg.router, cfg.experts, 61)


def std(weight: torch.Tensor) -> float:
    return float(weight.detach().std())


@pytest.mark.parametrize(
    ("overrides", "up", "down"),
    [
        (["router=topk"], 0.02, 0.01),  # init_std, and over the root of twice the layers
        (["router=sigma"], 53**-0.5, (7 * 37) ** -0.5),
        (["router=switch"], (0.1 / 53) ** 0.5, (0.1 / 37) ** 0.5),
        (["router=topk", "experts.first_weights=one_network"], 53**-0.5, (7 * 37) ** -0.5),
        (["router=sigma", "experts.first_weights=model"], 0.02, 0.01),
    ],
)
def test_experts_begin_as_they_are_told(overrides: list[str], up: float, down: float) -> None:
    model = decoder(*overrides)
    layer = model.blocks[1].feed_forward
    assert std(layer.experts.w_gate_up_EDCF) == pytest.approx(up, rel=0.03)
    assert std(layer.experts.w_down_EFD) == pytest.approx(down, rel=0.03)
    for other in (layer.shared, model.blocks[0].feed_forward):  # always as the model
        assert std(other.w_up_FD) == pytest.approx(0.02, rel=0.08)
        assert std(other.w_down_DF) == pytest.approx(0.01, rel=0.08)


def test_sigmas_experts_with_weight_one_are_the_dense_network() -> None:
    """Of width E F: an output of the variance that a dense one with its own first weights has."""
    layer = decoder("router=sigma").blocks[1].feed_forward.experts
    up_DH = layer.w_gate_up_EDCF[:, :, 0].transpose(0, 1).reshape(53, 259)
    down_HD = layer.w_down_EFD.reshape(259, 53)
    x_TD = torch.randn(4001, 53, generator=torch.Generator().manual_seed(1))
    wide = ((x_TD @ up_DH).relu() @ down_HD).detach()
    assert float(wide.var()) == pytest.approx(0.5, rel=0.1)  # E[relu(u)^2] of a unit normal u


@pytest.mark.parametrize(("router", "scale"), [("topk", 0.25), ("switch", 0.1), ("sigma", 1.0)])
def test_routers_begin_as_their_papers_say(router: str, scale: float) -> None:
    weight_ED = decoder(f"router={router}", "router.top_k=1").blocks[1].feed_forward.router.weight_ED
    assert std(weight_ED) == pytest.approx((scale / 53) ** 0.5, rel=0.12)
    norms_E = weight_ED.detach().norm(dim=1)
    same = bool((norms_E - norms_E[0]).abs().max() < 1e-5)
    assert same is (router == "sigma")


def test_adapters_have_first_weights_of_their_own() -> None:
    with pytest.raises(ValueError, match=r"experts\.first_weights=tenth is of networks, not of"):
        decoder("experts=adapters", "experts.first_weights=tenth", "model.num_shared_experts=0")


def test_switchs_router_begins_with_a_tenth_of_the_variance() -> None:
    torch.manual_seed(0)
    router = build_router("switch", d_model=211, num_experts=53)
    torch.testing.assert_close(float(router.weight_ED.std()), (0.1 / 211) ** 0.5, rtol=0.03, atol=0.0)
