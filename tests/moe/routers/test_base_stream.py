"""BASE layers whose affinities are of the residual stream, as published: a block against its equation.

Shapes: B batch, S sequence, T = B S, D model, E experts, F hidden.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from model_cases import TINY, VOCAB, tokens
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moetrain.models import Decoder
from moetrain.models.block import Block
from moetrain.models.hf.family import CannotExpressError, ModelSpec
from moetrain.models.hf.own import _write_routing
from moetrain.models.lora_options import LoraConfig
from moetrain.moe import MoELayer, RouterContext
from moetrain.moe.options import Backend, ExpertKind, ExpertsConfig
from moetrain.moe.routers.base_layers import Affinity, BaseOptions

B, S, E = 2, 10, 5
STREAM = BaseOptions(affinity=Affinity.stream)


def model(options: BaseOptions = STREAM, kind: ExpertKind = ExpertKind.networks) -> Decoder:
    torch.manual_seed(3)
    cfg = replace(TINY, lora=LoraConfig(rank=2)) if kind is ExpertKind.low_rank else TINY
    made = Decoder(cfg, options, ExpertsConfig(kind=kind, backend=Backend.loop), VOCAB).double()
    with torch.no_grad():
        for block in made.blocks:
            block.feed_forward_norm.weight_D.add_(torch.randn(TINY.d_model))
            block.feed_forward.router.weight_ED.mul_(9)
    return made


def chosen(affinity_TE: Tensor, training: bool) -> list[int]:
    """By scipy, each expert S / E times in a sequence; the best one in evaluation."""
    if not training:
        return affinity_TE.argmax(1).tolist()
    found: list[int] = []
    for rows_SE in affinity_TE.view(B, S, E).numpy(force=True):
        _, columns = linear_sum_assignment(np.repeat(rows_SE, S // E, axis=1), maximize=True)
        found += [int(column) // (S // E) for column in columns]
    return found


def by_hand(block: Block, x_BSD: Tensor, training: bool) -> Tensor:
    """x + sigmoid(x . w_e) FFN_e(norm(x)) of the stream x."""
    moe, x_TD = block.feed_forward, x_BSD.reshape(B * S, -1)
    affinity_TE = x_TD @ moe.router.weight_ED.t()
    rows = []
    for x_D, expert, z_E in zip(x_TD, chosen(affinity_TE.detach(), training), affinity_TE, strict=True):
        n_D = x_D / (x_D.square().mean() + TINY.norm_eps).sqrt() * block.feed_forward_norm.weight_D
        up_DP = moe.experts.w_gate_up_EDCF[expert].flatten(1)
        y_D = oracle.feed_forward(n_D, up_DP, moe.experts.w_down_EFD[expert], "swiglu")
        rows.append(x_D + y_D / (1 + torch.exp(-z_E[expert])))
    return torch.stack(rows).view_as(x_BSD)


@pytest.mark.parametrize("training", [True, False])
def test_a_block_is_the_published_one(training: bool) -> None:
    decoder = model().train(training)
    block = decoder.blocks[1]
    block.attention.forward = lambda x_BSD, *_: torch.zeros_like(x_BSD)  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(5)
    x_BSD = torch.randn(B, S, TINY.d_model, dtype=torch.float64, generator=generator).requires_grad_()
    ctx = RouterContext.default(B, S)
    found, expected = block(x_BSD, None, None, ctx)[0], by_hand(block, x_BSD, training)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    leaves = [x_BSD, block.feed_forward.router.weight_ED, block.feed_forward_norm.weight_D]
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", list(ExpertKind))
def test_the_stream_decides_and_not_its_norm(kind: ExpertKind) -> None:
    """Only with the option, also for adapters and products, and in a whole model."""
    decoder, plain = model(kind=kind).eval(), model(BaseOptions(), kind).eval()
    plain.load_state_dict(decoder.state_dict())
    seen: dict[str, list[Tensor]] = {"normed": [], "stream": []}
    for name, each in (("stream", decoder), ("normed", plain)):
        for block in each.blocks:
            block.feed_forward_norm.register_forward_hook(
                lambda module, args, out, into=seen[name], normed=name == "normed": into.append(
                    out if normed else args[0]
                )
            )
        for layer, record in each(tokens(B, S)).records.items():
            read_TD = seen[name][layer].reshape(B * S, -1)
            expected = read_TD @ each.blocks[layer].feed_forward.router.weight_ED.t()
            torch.testing.assert_close(record.logits_TE, expected, rtol=1e-11, atol=1e-11)


def test_a_layer_by_itself_has_only_its_input() -> None:
    torch.manual_seed(0)
    layer, plain = (MoELayer(7, 5, 3, "base", o) for o in (STREAM, BaseOptions()))
    plain.load_state_dict(layer.state_dict())
    x_BSD = torch.randn(2, 6, 7)
    assert torch.equal(layer(x_BSD)[0], plain(x_BSD)[0])


def test_the_stream_is_not_exported() -> None:
    spec = ModelSpec(replace(TINY, vocab_size=VOCAB), STREAM, ExpertsConfig())
    with pytest.raises(CannotExpressError, match="router=base with these options"):
        _write_routing(spec)
    assert _write_routing(replace(spec, router=BaseOptions()))["routing"]["score"] == "sigmoid"
