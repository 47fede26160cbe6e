"""Routers that read the stream before attention, or what the MoE layer before read: against plain torch."""

from __future__ import annotations

import plain_blocks as plain
import pytest
import torch
from model_cases import decoder, tokens

from moetrain.errors import UserError
from moetrain.models.decoder import Decoder
from moetrain.models.wiring_options import RouterInput, Wiring

IDS = tokens(2, 5)


def hidden(model: Decoder, router_input: RouterInput) -> torch.Tensor:
    x, last = model.embed_VD[IDS], None
    for block in model.blocks:
        before, x = x, plain.attended(model, block, x)
        read = plain.norm(block.feed_forward_norm, x)
        if not hasattr(block.feed_forward, "router"):
            y = plain.mlp(block.feed_forward, read)
        elif router_input is RouterInput.pre_attention:
            y = plain.moe(block.feed_forward, read, before)
        else:
            y, last = plain.moe(block.feed_forward, read, read if last is None else last), read
        x = x + y
    return plain.norm(model.norm, x)


@pytest.mark.parametrize("router_input", [RouterInput.pre_attention, RouterInput.previous_moe])
@pytest.mark.parametrize("changes", [{}, {"num_layers": 4, "moe_every": 2}, {"num_shared_experts": 1}])
def test_output_and_gradients(router_input: RouterInput, changes: dict[str, int]) -> None:
    model = decoder(router_input=router_input, **changes)
    plain.assert_same(model, IDS, hidden(model, router_input))


@pytest.mark.parametrize("router_input", [RouterInput.pre_attention, RouterInput.previous_moe])
def test_the_routers_input_is_the_very_stream(router_input: RouterInput) -> None:
    model, seen, inputs, reads = decoder(router_input=router_input), [], [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
        block.feed_forward.register_forward_pre_hook(lambda _, args: reads.append(args[0].flatten(0, 1)))
        block.feed_forward.router.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(IDS)
    wanted = inputs if router_input is RouterInput.pre_attention else [reads[0], *reads[:-1]]
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))


def test_the_choice_before_attention_does_not_depend_on_it() -> None:
    """It is known before attention begins: that of the first layer does not see other tokens at all."""
    model, changed = decoder(router_input=RouterInput.pre_attention), IDS.clone()
    changed[:, :-1] = (changed[:, :-1] + 1) % 41
    one, other = (model(ids).records[0].logits_TE.view(2, 5, -1) for ids in (IDS, changed))
    assert torch.equal(one[:, -1], other[:, -1])
    plainly = [decoder()(ids).records[0].logits_TE.view(2, 5, -1)[:, -1] for ids in (IDS, changed)]
    assert not torch.equal(*plainly)


def test_a_residual_layers_router_reads_it_too() -> None:
    model = decoder(router_input=RouterInput.pre_attention, wiring=Wiring.residual)
    assert not torch.equal(model(IDS).hidden_BSD, decoder(wiring=Wiring.residual)(IDS).hidden_BSD)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_experts": 0}, r"model.router_input=pre_attention is of MoE layers, but model.num_experts=0"),
        ({"feed_forward": "own"}, r"is of model.feed_forward=moe, not own: set model.router_input=own"),
        (
            {"wiring": Wiring.shortcut, "num_shared_experts": 1},
            r"with model.wiring=shortcut the router reads what model.shortcut_from says",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line):
        decoder(router_input=RouterInput.pre_attention, **changes)
