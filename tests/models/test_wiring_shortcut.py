"""Shortcut-connected MoE: against plain torch, and overlapped to the bits of one after the other."""

from __future__ import annotations

import plain_blocks as plain
import pytest
import torch
from model_cases import decoder, tokens

from moetrain.errors import UserError
from moetrain.models import count_parameters
from moetrain.models.block import ShortcutBlock
from moetrain.models.decoder import Decoder
from moetrain.models.wiring_options import ShortcutFrom, Wiring
from moetrain.moe import MoELayer
from moetrain.parallel.apply import parallelize
from moetrain.parallel.mesh import Meshes

IDS = tokens(2, 5)
SHORTCUT = {"wiring": Wiring.shortcut, "num_shared_experts": 1}


def hidden(model: Decoder, start: ShortcutFrom) -> torch.Tensor:
    x, earlier = model.embed_VD[IDS], None
    for block in model.blocks:
        s = x if start is ShortcutFrom.block_input or earlier is None else earlier
        x = earlier = plain.attended(model, block, x)
        read = plain.norm(block.feed_forward_norm, x)
        if isinstance(block, ShortcutBlock):
            layer = block.feed_forward
            y = plain.experts(layer, plain.norm(block.shortcut_norm, s)) + plain.mlp(layer.shared, read)
        else:
            y = plain.mlp(block.feed_forward, read)
        x = x + y
    return plain.norm(model.norm, x)


@pytest.mark.parametrize("start", list(ShortcutFrom))
@pytest.mark.parametrize("changes", [{}, {"num_layers": 4, "moe_every": 2}])
def test_output_and_gradients(start: ShortcutFrom, changes: dict[str, int]) -> None:
    model = decoder(shortcut_from=start, **SHORTCUT, **changes)
    plain.assert_same(model, IDS, hidden(model, start))


def test_fed_with_its_own_stream_it_is_the_usual_layer() -> None:
    model, usual = decoder(**SHORTCUT), decoder(num_shared_experts=1)
    for block in model.blocks:
        block.shortcut_norm = block.feed_forward_norm
    usual.load_state_dict({k: v for k, v in model.state_dict().items() if ".shortcut_norm." not in k})
    x = torch.randn(2, 5, 23).double()
    for block, other in zip(model.blocks, usual.blocks, strict=True):
        layer = block.feed_forward
        read = block.feed_forward_norm(x)
        started = layer.start(block.shortcut_norm(x))
        y, _ = layer.finish(started, layer.compute(started), layer.beside(started, read))
        wanted, _ = other.feed_forward(other.feed_forward_norm(x))
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("start", list(ShortcutFrom))
@pytest.mark.parametrize("recompute", [False, True])
def test_overlapped_equals_one_after_the_other_to_the_bit(
    start: ShortcutFrom, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder(torch.float32, shortcut_from=start, **SHORTCUT)
    order: list[str] = []
    monkeypatch.setattr(MoELayer, "start", noted(MoELayer.start, "start", order))
    for block in model.blocks:
        block.attention.register_forward_pre_hook(lambda *_: order.append("attention"))
    if recompute:
        parallelize(model, Meshes(), recompute=True)
    runs = []
    for overlapped in (True, False):
        monkeypatch.setattr(ShortcutBlock, "overlapped", overlapped)
        order.clear()
        hidden_BSD = model(IDS).hidden_BSD
        assert order == (["start", "attention"] if overlapped else ["attention", "start"]) * 3
        runs.append([hidden_BSD, *plain.gradients(model, hidden_BSD)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def noted(function, name, order):
    def run(*args, **kwargs):
        order.append(name)
        return function(*args, **kwargs)

    return run


def test_what_it_adds_is_a_norm_a_layer() -> None:
    one, other = (count_parameters(model) for model in (decoder(num_shared_experts=1), decoder(**SHORTCUT)))
    assert other.norms - one.norms == 3 * 23
    assert other.total - one.total == 3 * 23


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"wiring": Wiring.shortcut}, r"model.num_shared_experts=0: set model.num_shared_experts=1"),
        (
            {"shortcut_from": ShortcutFrom.block_input},
            r"shortcut_from=block_input is of .*not of plain",
        ),
        ({**SHORTCUT, "num_experts": 0}, r"model.wiring=shortcut is of MoE layers, but model.num_experts=0"),
        ({**SHORTCUT, "feed_forward": "own"}, r"model.wiring=shortcut is of model.feed_forward=moe, not own"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line):
        decoder(**changes)
