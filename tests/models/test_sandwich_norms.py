"""Norms on both sides of a block's halves, a base of rotation for layers with a window, a rounded factor.

Shapes: B batch, S sequence, D model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import plain_blocks as plain
import pytest
import torch
from model_cases import TINY, VOCAB, decoder, tokens
from torch import Tensor

from moetrain.errors import UserError
from moetrain.models import Decoder, generate
from moetrain.models.options import LayerWindow, window_of
from moetrain.models.rope_options import RopeKind, RopeScaling
from moetrain.models.scale_options import ScalesConfig
from moetrain.models.wiring_options import RouterInput, Wiring
from moetrain.moe.options import ExpertsConfig
from moetrain.moe.routers.topk import TopKOptions
from moetrain.train.optim.build import NO_DECAY, group_parameters

SLIDING, FULL = LayerWindow
IDS_BS = tokens(2, 11)
LOCAL: dict[str, Any] = {
    "sliding_window": 3,
    "window_pattern": (SLIDING, FULL),
    "rope_theta": 50.0,
    "window_rope_theta": 7.0,
    "rope_scaling": RopeScaling(RopeKind.linear, 4.0),
}


def hidden(model: Decoder) -> Tensor:
    """In plain torch; the first layer is dense, the others are MoE."""
    cfg, x_BSD = model.cfg, model.embed_VD[IDS_BS]
    for layer, block in enumerate(model.blocks):
        windowed = window_of(cfg, layer) is not None
        theta, factor = (7.0, 1.0) if windowed else (50.0, 4.0)
        read_BSD = plain.norm(block.attention_norm, x_BSD)
        y_BSD = plain.attention(block.attention, read_BSD, theta, 3 if windowed else None, factor)
        x_BSD = x_BSD + plain.norm(block.attention_out_norm, y_BSD)
        y_BSD = plain.feed(block.feed_forward, plain.norm(block.feed_forward_norm, x_BSD))
        x_BSD = x_BSD + plain.norm(block.feed_forward_out_norm, y_BSD)
    return plain.norm(model.norm, x_BSD)


def test_output_and_every_gradient_are_those_of_plain_torch() -> None:
    model = decoder(sandwich_norms=True, first_dense=1, num_shared_experts=1, **LOCAL)
    plain.assert_same(model, IDS_BS, hidden(model))


def test_cached_text_is_that_of_the_whole_sequence() -> None:
    model = decoder(sandwich_norms=True, router_input=RouterInput.pre_attention, **LOCAL).eval()
    text = generate(model, IDS_BS[0].tolist(), 9, temperature=0)
    ids = IDS_BS[:1].tolist()[0]
    for token in text:
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([ids])).hidden_BSD)
        assert int(logits[0, -1].argmax()) == token
        ids.append(token)
    assert len(set(text)) > 2


def test_a_factor_is_rounded_to_what_it_multiplies() -> None:
    """In bf16 the root of 23 is 4.78125; in fp32 nearly itself."""
    scales = ScalesConfig(embedding=23**0.5, round_embedding=True)
    for dtype, factor in ((torch.bfloat16, 4.78125), (torch.float64, 23**0.5)):
        model = decoder(dtype, scales=scales)
        seen: list[Tensor] = []
        model.blocks[0].register_forward_hook(lambda module, given, out, seen=seen: seen.append(given[0]))
        model(IDS_BS)
        assert torch.equal(seen[0], model.embed_VD[IDS_BS] * factor)


def test_norms_start_as_the_model_and_do_not_decay() -> None:
    for centred in (False, True):
        cfg = replace(TINY, sandwich_norms=True, zero_centered_norms=centred)
        model = Decoder(cfg, TopKOptions(), ExpertsConfig(), VOCAB)
        norms = {name: p for name, p in model.named_parameters() if "_out_norm." in name}
        assert len(norms) == 2 * TINY.num_layers
        assert all(bool((p == (0 if centred else 1)).all()) for p in norms.values())
        assert norms.keys() <= {name for name, _ in group_parameters(model, True)[NO_DECAY]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sandwich_norms": True, "wiring": Wiring.momentum}, "sandwich_norms=true is of plain blocks"),
        ({"window_rope_theta": 7.0}, "window_rope_theta=7.0 is of some layers"),
        ({"window_rope_theta": 7.0, "sliding_window": 3}, "window_rope_theta=7.0 is of some layers"),
        ({**LOCAL, "window_rope_theta": 0.0}, "window_rope_theta=0.0 must be"),
        ({"scales": ScalesConfig(round_embedding=True)}, "round_embedding=true rounds"),
        ({**LOCAL, "attention": "latent", "rope_scaling": RopeScaling()}, "window_rope_theta=7.0 is read by"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        decoder(**{"head_dim": None, "num_kv_heads": None, "d_model": 24, **changes})
    assert words in str(caught.value)
