"""Residual MoE and layers of different sizes, against plain torch in fp64."""

from __future__ import annotations

import plain_blocks as plain
import pytest
import torch
from model_cases import TINY, VOCAB, decoder, tokens

from moetrain.models import count_parameters
from moetrain.models.decoder import Decoder
from moetrain.models.options import ModelConfig
from moetrain.models.wiring_options import Wiring
from moetrain.moe.options import ExpertKind, ExpertsConfig
from moetrain.moe.routers.topk import TopKOptions

IDS = tokens(2, 5)


def hidden(model: Decoder) -> torch.Tensor:
    """Of plain and residual blocks."""
    x = model.embed_VD[IDS]
    for block in model.blocks:
        x = plain.attended(model, block, x)
        read = plain.norm(block.feed_forward_norm, x)
        y = plain.feed(block.feed_forward, read)
        if hasattr(block, "dense"):
            mix = (read @ block.w_mix_2D.T + block.b_mix_2).softmax(-1)
            y = mix[..., :1] * y + mix[..., 1:] * plain.mlp(block.dense, read)
        x = x + y
    return plain.norm(model.norm, x)


@pytest.mark.parametrize(
    "changes",
    [
        {},  # that the oracle itself is right
        {"wiring": Wiring.residual, "first_dense": 1},
        {"wiring": Wiring.residual, "num_shared_experts": 1, "num_layers": 2},
        {"layer_experts": (3, 7), "num_experts": 7, "first_dense": 1},
        {"layer_widths": (13, 5, 11)},
        {"wiring": Wiring.residual, "layer_experts": (5, 3), "layer_widths": (7, 13), "num_layers": 2},
    ],
)
def test_output_and_gradients_are_those_of_plain_torch(changes: dict[str, object]) -> None:
    model = decoder(**changes)
    plain.assert_same(model, IDS, hidden(model))


def test_coefficients_at_their_ends_give_either_part_alone() -> None:
    model = decoder(wiring=Wiring.residual, num_layers=1)
    block = model.blocks[0]
    x = plain.attended(model, block, model.embed_VD[IDS])
    read = plain.norm(block.feed_forward_norm, x)
    parts = (plain.feed(block.feed_forward, read), plain.mlp(block.dense, read))
    for column, part in enumerate(parts):
        with torch.no_grad():
            block.w_mix_2D.zero_()
            block.b_mix_2.copy_(torch.tensor([-1e4, 1e4]) * (1 if column else -1))
        expected = plain.norm(model.norm, x + part)
        torch.testing.assert_close(model(IDS).hidden_BSD, expected, rtol=1e-12, atol=1e-12)


def test_a_parallel_dense_branch_is_a_shared_expert_of_its_width() -> None:
    model = decoder(num_layers=1, num_shared_experts=1, d_ff_shared=29)
    block = model.blocks[0]
    x = plain.attended(model, block, model.embed_VD[IDS])
    read = plain.norm(block.feed_forward_norm, x)
    y = plain.experts(block.feed_forward, read) + plain.mlp(block.feed_forward.shared, read)
    assert block.feed_forward.shared.w_up_FD.shape == (29, 23)
    plain.assert_same(model, IDS, plain.norm(model.norm, x + y))


def test_each_layer_has_its_own_number_and_width() -> None:
    model = decoder(layer_experts=(2, 5, 3), layer_widths=(13, 7, 11))
    layers = [layer.experts for (layer,) in model.moe_layers().values()]
    assert [(e.num_experts, e.w_down_EFD.shape[1]) for e in layers] == [(2, 13), (5, 7), (3, 11)]
    counts = count_parameters(model)
    assert counts.experts == 3 * 23 * (2 * 13 + 5 * 7 + 3 * 11)
    assert counts.experts_active == 3 * 23 * 2 * (13 + 7 + 11)
    assert counts.router == 23 * (2 + 5 + 3)


def test_experts_of_different_widths_count_with_their_mean() -> None:
    widths = (4, 12, 8, 8, 8)
    model = decoder(expert_widths=widths, d_ff_expert=12, num_shared_experts=1)
    counts = count_parameters(model)
    assert counts.experts == 3 * 3 * 23 * sum(widths)
    assert counts.experts_active == 3 * 3 * 23 * sum(widths) * 2 // 5
    assert counts.shared == 3 * 3 * 23 * 12
    assert counts.total == sum(p.numel() for p in model.parameters())


def test_what_a_residual_layer_adds_is_counted() -> None:
    one, other = decoder(), decoder(wiring=Wiring.residual)
    counts, before = count_parameters(other), count_parameters(one)
    assert counts.dense - before.dense == 3 * (3 * 23 * 29 + 2 * 23)
    assert counts.biases - before.biases == 3 * 2
    assert counts.total == sum(p.numel() for p in other.parameters())


def test_adapters_cannot_be_taken_apart() -> None:
    cfg = ModelConfig(**{**vars(TINY), "wiring": Wiring.residual})
    with pytest.raises(ValueError, match=r"experts.kind=adapters .* set model.wiring=plain"):
        Decoder(cfg, TopKOptions(), ExpertsConfig(kind=ExpertKind.adapters), VOCAB)
