"""Windows of some layers, sinks and biases: of a whole decoder, in generation, in training, and refused.

Shapes: B batch, S sequence, D model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from model_cases import TINY, VOCAB, tokens

from moetrain.config.hydra.compose import compose_train
from moetrain.config.validate import validate
from moetrain.errors import UserError
from moetrain.models import Decoder
from moetrain.models.cache import KVCache
from moetrain.models.options import LayerWindow, window_of
from moetrain.moe.options import Activation, ExpertsConfig
from moetrain.moe.routers.topk import Score, TopKOptions
from moetrain.train.optim.build import DECAY, MUON, NO_DECAY, group_parameters

SLIDING, FULL = LayerWindow
CFG = replace(
    TINY,
    num_layers=3,
    qkv_bias=True,
    out_bias=True,
    attention_sinks=True,
    sliding_window=4,
    window_pattern=(SLIDING, FULL),
)
ROUTER = TopKOptions(top_k=2, score=Score.softmax_after, logit_bias=True)
EXPERTS = ExpertsConfig(activation=Activation.swiglu_clamped, bias=True)


def decoder(**changes: Any) -> Decoder:
    """In fp64, with biases and sinks that are not zero."""
    torch.manual_seed(0)
    model = Decoder(replace(CFG, **changes), ROUTER, EXPERTS, VOCAB).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or ".b_" in name:
                parameter.normal_()
    return model


def test_the_pattern_goes_over_and_over() -> None:
    cfg = replace(CFG, num_layers=7, window_pattern=(SLIDING, SLIDING, FULL))
    assert [window_of(cfg, layer) for layer in range(7)] == [4, 4, None, 4, 4, None, 4]


@torch.no_grad()
def test_what_a_token_sees_goes_by_the_windows() -> None:
    """Of two sliding layers a token reaches 2 (w - 1) back; through a full one everything."""
    ids_BS = tokens(1, 13)
    other_BS = ids_BS.clone()
    other_BS[:, 0] = (other_BS[:, 0] + 1) % VOCAB
    for pattern, last in (((SLIDING, FULL), 12), ((), 6)):
        model = decoder(num_layers=2, window_pattern=pattern)
        one, other = model(ids_BS).hidden_BSD, model(other_BS).hidden_BSD
        changed = ((one - other).abs().amax(-1) > 1e-12)[0].nonzero()[:, 0].tolist()
        assert changed == list(range(last + 1)), pattern


@torch.no_grad()
def test_a_cache_gives_what_the_whole_sequence_gives() -> None:
    model, ids_BS = decoder(), tokens(2, 17)
    whole_BSD = model(ids_BS).hidden_BSD
    cache = KVCache(len(model.blocks), 17)
    parts = [model(part_BS, cache=cache).hidden_BSD for part_BS in ids_BS.split([7, 1, 1, 5, 3], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole_BSD, rtol=0, atol=1e-12)


@torch.no_grad()
def test_documents_stay_apart() -> None:
    model, ids_BS = decoder(), tokens(2, 19)
    doc_ids_BS = (torch.arange(19) >= 8).long().expand(2, -1)
    positions_BS = torch.cat([torch.arange(8), torch.arange(11)]).expand(2, -1)
    packed_BSD = model(ids_BS, doc_ids_BS=doc_ids_BS, positions_BS=positions_BS).hidden_BSD
    alone_BSD = torch.cat([model(part).hidden_BSD for part in ids_BS.split([8, 11], 1)], 1)
    torch.testing.assert_close(packed_BSD, alone_BSD, rtol=0, atol=1e-12)


def test_biases_and_sinks_begin_at_zero_and_do_not_decay() -> None:
    model = Decoder(CFG, ROUTER, EXPERTS, VOCAB)
    named = dict(model.named_parameters())
    ours = {name for name in named if "bias" in name or ".b_" in name}
    assert len(ours) == 3 * (5 + 1 + 2)  # of q, k, v, out, the sink; the router's; of both projections
    assert not any(named[name].any() for name in ours)
    for muon in (False, True):
        groups = {key: {name for name, _ in group} for key, group in group_parameters(model, muon).items()}
        assert ours <= groups[NO_DECAY]
        assert "blocks.0.feed_forward.experts.w_gate_up_EDCF" in groups[MUON if muon else DECAY]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.window_pattern=[sliding,full]"], "window_pattern=[sliding,full] is of model.sliding_window"),
        (
            ["model.window_pattern=[full,full]", "model.sliding_window=3"],
            "all layers are alike; leave it out, and set model.sliding_window=null",
        ),
        (
            ["model.window_pattern=[full,full,full,full,sliding]", "model.sliding_window=3"],
            "names 5 layers, but model.num_layers=4",
        ),
        (["experts=adapters", "experts.bias=true"], "experts.bias=true is of networks"),
        (
            ["experts.bias=true", "model.num_experts=2", "model.expert_widths=[256,128]"],
            "experts.bias=true is of experts of one width",
        ),
        (
            ["model.feed_forward=moe_x", "experts.activation=relu", "router.logit_bias=true"],
            "router.logit_bias=true has no place among its logits",
        ),
        (
            ["model.feed_forward=peer", "experts.activation=relu", "experts.bias=true", "balance=none"],
            "experts.bias=true is of dispatched experts",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(compose_train(overrides), 1)
    assert words in str(caught.value)
