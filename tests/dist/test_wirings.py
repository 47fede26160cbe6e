"""Wirings of blocks and shapes of experts over ranks: equal to one process, and rows in flight."""

from __future__ import annotations

import pytest
import torch
from model_cases import decoder, tokens
from wiring_cases import WIRINGS

from moetrain.config.hydra.compose import compose_train
from moetrain.models.block import ShortcutBlock
from moetrain.models.wiring_options import ShortcutFrom, Wiring
from moetrain.moe.dispatch.collectives import Collective
from moetrain.parallel.apply import parallelize
from moetrain.parallel.mesh import build_meshes
from moetrain.parallel.options import ParallelConfig
from moetrain.parallel.ranks import run_ranks
from moetrain.verify.command import prove
from moetrain.verify.twin import twin_of

LAYOUTS = {"ep 2": (2, ["parallel.ep=2"]), "hsdp 2 x ep 2": (4, ["parallel.ep=2", "parallel.dp_replicate=2"])}
DAILY = [("scmoe", "ep 2"), ("hmoe", "ep 2")]
EVERY = [(name, layout) for layout in LAYOUTS for name in WIRINGS]
WHEN = {"ep 2": pytest.mark.slow, "hsdp 2 x ep 2": pytest.mark.real}  # the second holds the first
MORE = ("adam_smoe", "robust_smoe", "scmoe, block_input", "smallthinker")  # of a kind that another one has
PAIRS = [
    pytest.param(*pair, marks=[] if pair in DAILY else pytest.mark.slow if pair[0] in MORE else WHEN[pair[1]])
    for pair in EVERY
]


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_a_layout_equals_one_process(name, layout):
    world, parallel = LAYOUTS[layout]
    overrides = [*WIRINGS[name], *parallel]
    if name in ("scmoe", "scmoe, block_input", "pre_gated", "drelu"):
        overrides.append("model.num_experts=4")
    if name == "drelu":  # its widths are of two layers
        overrides += ["model.num_layers=2", "model.d_ff_expert=12"]
    found = prove(twin_of(compose_train(overrides), world, 8), 1e-9)
    assert [check.problem for check in found if not check.holds] == []
    assert sum(check.number for check in found) > 100


class Seen:
    """What a rank does, in order; the context of a collective is left as its wait ends."""

    def __init__(self):
        self.events: list[str] = []
        self.bytes = 0

    def __call__(self, collective: Collective):
        if collective.kind == "host":
            return _Silent()
        self.events.append(f"start {collective.name}")
        self.bytes += sum(collective.sent) * collective.row_bytes
        return _Wait(self.events, collective.name)


class _Silent:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


class _Wait(_Silent):
    def __init__(self, events, name):
        self.events, self.name = events, name

    def __enter__(self):
        self.events.append(f"wait {self.name}")


def watch(model, events):
    for place, block in enumerate(model.blocks):
        layer, shared = block.attention, block.feed_forward.shared
        layer.register_forward_pre_hook(lambda *_, p=place: events.append(f"attention {p}"))
        layer.register_full_backward_hook(lambda *_, p=place: events.append(f"back {p}"))
        shared.register_forward_pre_hook(lambda *_: events.append("shared"))


def shortcut_on_ranks(rank: int, world: int, start: ShortcutFrom):
    """(outputs and gradients, events, bytes) of a pass overlapped, and of one after the other."""
    found = []
    for overlapped in (True, False):
        ShortcutBlock.overlapped = overlapped
        wiring = {"wiring": Wiring.shortcut, "shortcut_from": start, "num_shared_experts": 1}
        model, seen = decoder(torch.float32, num_experts=6, num_layers=2, **wiring), Seen()
        meshes = build_meshes(ParallelConfig(ep=world), world, "cpu")
        parallelize(model, meshes, observer=seen)
        watch(model, seen.events)
        hidden = model(tokens(2, 5, seed=rank)).hidden_BSD
        seen.events.append("backward")
        hidden.square().sum().backward()
        grads = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in model.parameters()]
        found.append(([hidden.detach(), *[grad.clone() for grad in grads]], seen.events, seen.bytes))
    return found


@pytest.mark.parametrize("start", list(ShortcutFrom))
def test_a_shortcuts_rows_travel_during_attention(start):
    for overlapped, sequential in run_ranks(shortcut_on_ranks, 2, start):
        assert all(torch.equal(a, b) for a, b in zip(overlapped[0], sequential[0], strict=True))
        assert overlapped[2] == sequential[2] > 0
        assert sorted(overlapped[1]) == sorted(sequential[1])  # as many transfers, and as many waits
        for events, first in ((overlapped[1], "start rows"), (sequential[1], "attention 0")):
            names = [
                event for event in events if event in ("start rows", "wait rows", "attention 0", "shared")
            ]
            order = ["start rows", "attention 0"] if first == "start rows" else ["attention 0", "start rows"]
            assert names[:4] == [*order, "wait rows", "shared"]
            assert events.index("start results") < events.index("shared") < events.index("wait results")
        back = overlapped[1][overlapped[1].index("backward") :]
        begun, ended = back.index("start rows' gradients"), back.index("wait rows' gradients")
        assert begun < back.index("back 1") < ended
