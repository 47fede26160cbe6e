"""``experts.keep=inputs``: no pre-activation is kept, and every gradient has the bits that it has with one.

Shapes: X source rows, D model, R rows, E experts, F hidden, P = 2F (gated) or F.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from operator_cases import operands, rows_of, saved_bytes
from torch import Tensor

from moetrain.config.hydra.compose import compose_train
from moetrain.models.feed_forward import build_feed_forward
from moetrain.moe import MoELayer
from moetrain.moe.options import Keep
from moetrain.ops import Rows, expert_mlp
from moetrain.ops.activations import is_gated
from moetrain.ops.cpu import per_expert
from moetrain.ops.experts.case import Case
from moetrain.ops.experts.operands import Operands
from moetrain.ops.experts.self_test import failure

BACKENDS = ["loop", "cpu", "torch"]
COUNTS = [17, 0, 5, 37, 1]


def outcome(
    rows: Rows, leaves: tuple[Tensor, ...], activation: str, backend: str, keep: bool
) -> list[Tensor]:
    source, weights, up, down = leaves
    out = expert_mlp(source, rows, weights, up, down, activation, backend, keep=keep)
    dout = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out) * (rows.ids_R >= 0)[:, None]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_bits(backend: str, dtype: torch.dtype, activation: str) -> None:
    rows = rows_of(COUNTS, 41, 8)
    leaves = operands(rows, 41, 16, 24, dtype, is_gated(activation))
    kept = outcome(rows, leaves, activation, backend, keep=True)
    again = outcome(rows, leaves, activation, backend, keep=False)
    assert kept[0].any()
    assert all(map(torch.equal, kept, again))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_weights_and_indices_are_all_that_is_kept(backend: str) -> None:
    rows = rows_of(COUNTS, 41, 8)
    leaves = operands(rows, 41, 16, 24, torch.float32)
    source, weights, up, down = leaves
    with saved_bytes() as kept:
        expert_mlp(source, rows, weights, up, down, "swiglu", backend, keep=False)
    r, floats = len(rows.ids_R), sum(leaf.numel() for leaf in leaves)
    if backend == "loop":  # torch.utils.checkpoint holds its inputs, not autograd
        assert sum(kept.values()) == 0
    else:
        assert sum(kept.values()) == 4 * floats + 8 * (r + sum(COUNTS) + 41 + len(COUNTS))


def test_no_rows() -> None:
    rows = rows_of([0, 0], 3, 8)
    leaves = operands(rows, 3, 16, 24, torch.float32)
    for value in outcome(rows, leaves, "swiglu", "cpu", keep=False):
        assert not value.any()


@pytest.mark.parametrize("keep", list(Keep))
def test_a_layer_computes_what_it_does_not_keep(keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x_BSD = MoELayer(16, 24, 5, backend="cpu", keep=keep), torch.randn(2, 19, 16)
    layer(x_BSD)  # with its self-test
    computed: list[int] = []  # experts whose up projection was
    real = per_expert._pre_activation
    monkeypatch.setattr(
        per_expert, "_pre_activation", lambda of, e, *place: computed.append(e) or real(of, e, *place)
    )
    y_BSD, routing = layer(x_BSD)
    used = [e for e, count in enumerate(routing.assignment.counts_E.tolist()) if count]
    assert computed == used
    y_BSD.sum().backward()
    assert computed == used * (2 if keep is Keep.inputs else 1)


class Stale:
    """The CPU's backend, which computes the pre-activations of another expert again."""

    forward = staticmethod(per_expert.forward)

    def backward(self, dout: Tensor, operands: Operands, kept: list[Tensor] | None) -> tuple[Tensor, ...]:
        if kept is None:
            _, kept = per_expert.forward(operands, keep=True)
            kept = [z.flip(0) for z in kept]
        return per_expert.backward(dout, operands, kept)


def test_the_self_test_is_of_what_is_asked() -> None:
    case = Case(torch.device("cpu"), torch.float32, 40, 24, "swiglu")
    assert failure(Stale(), case) is None  # type: ignore[arg-type]
    found = failure(Stale(), Case(case.device, case.dtype, 40, 24, "swiglu", keep=False))  # type: ignore[arg-type]
    assert "gradient of" in (found or "nothing")


def test_the_key_reaches_the_experts() -> None:
    cfg = compose_train(["experts.keep=inputs"])
    layer = build_feed_forward("moe", replace(cfg.model, d_model=16), cfg.router, cfg.experts, 0)
    assert layer.experts.keep is Keep.inputs
