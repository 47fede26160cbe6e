"""Constant factors within a decoder: the same as weights that are multiplied by them."""

from typing import Any

import pytest
import torch
from model_cases import decoder, tokens

from moetrain.errors import UserError
from moetrain.models.cache import KVCache
from moetrain.models.scale_options import ScalesConfig
from moetrain.models.wiring_options import Wiring


@torch.no_grad()
def test_scales_are_weights_multiplied() -> None:
    """By residual: what each half of a block adds; the first layer is dense, the others are MoE."""
    shape: dict[str, Any] = {"first_dense": 1, "tie_embeddings": False, "qkv_bias": True, "out_bias": True}
    scales = ScalesConfig(embedding=1.7, residual=0.3, attention=0.05, logits_divisor=0.6)
    scaled, plain = decoder(scales=scales, **shape), decoder(**shape)
    for parameter in scaled.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    plain.load_state_dict(scaled.state_dict())
    plain.embed_VD *= 1.7
    plain.head_weight.div_(0.6)
    for name, parameter in plain.named_parameters():
        if any(part in name for part in ("w_out_", "b_out_", "w_down_")):
            parameter *= 0.3
        elif ".w_q_" in name or ".b_q_" in name:
            parameter *= 0.05 * plain.attentions()[0].heads.head_dim ** 0.5
    ids = tokens(2, 11)
    expected = plain.logits(plain(ids).hidden_BSD)
    found = scaled(ids).hidden_BSD
    torch.testing.assert_close(scaled.logits(found), expected, rtol=1e-10, atol=1e-10)
    cache = KVCache(3, 11)
    parts = [scaled(piece, cache=cache).hidden_BSD for piece in ids.split([4, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), found, rtol=1e-11, atol=1e-11)


def test_scales_that_would_not_act_are_refused() -> None:
    for changes, words in (
        (
            {"scales": ScalesConfig(residual=0.5), "wiring": Wiring.momentum},
            r"scales\.residual=0\.5 is of plain",
        ),
        ({"scales": ScalesConfig(attention=0.5), "attention": "other"}, r"scales\.attention=0\.5 would not"),
        ({"scales": ScalesConfig(embedding=0.0)}, r"model\.scales\.embedding=0\.0 must be"),
    ):
        with pytest.raises(UserError, match=words):
            decoder(**changes)  # type: ignore[arg-type]
