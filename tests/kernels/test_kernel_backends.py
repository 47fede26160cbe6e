"""The experts' Triton backends in the layer and in training, by Triton's interpreter: equal to ``loop``.

Shapes: B batch, S sequence, D model.
"""

from __future__ import annotations

from pathlib import Path

import interpreted  # noqa: F401  before any kernel
import pytest
import tiny
import torch
from torch import Tensor

from moetrain.moe import MoELayer
from moetrain.moe.context import RouterContext
from moetrain.ops.experts import table

BACKENDS = ["triton", "triton_block_sparse"]


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A self-test takes seconds in the interpreter; it is tested elsewhere."""
    monkeypatch.setattr(table, "_self_test", lambda name, case: None)


def outcome(layer: MoELayer, x_BSD: Tensor) -> dict[str, Tensor]:
    x_BSD = x_BSD.detach().clone().requires_grad_()
    y_BSD, _ = layer(x_BSD, RouterContext.default(*x_BSD.shape[:2], x_BSD.device))
    cotangent = torch.linspace(-1, 2, y_BSD.numel(), dtype=y_BSD.dtype).view(y_BSD.shape)
    named = dict(layer.named_parameters())
    grads = torch.autograd.grad((y_BSD * cotangent).sum(), [x_BSD, *named.values()])
    return {"y": y_BSD.detach(), "x": grads[0], **dict(zip(named, grads[1:], strict=True))}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("router", ["topk", "expert_choice", "relu", "moepp"])
def test_a_layer_equals_the_loop(router: str, backend: str) -> None:
    torch.manual_seed(0)
    layer = MoELayer(19, 23, 5, router, activation="swiglu", backend="loop", num_shared_experts=1, block=16)
    x_BSD = torch.randn(2, 17, 19)
    want = outcome(layer, x_BSD)
    layer.use_backend(backend)
    for name, value in outcome(layer, x_BSD).items():
        torch.testing.assert_close(
            value, want[name], rtol=1e-5, atol=1e-5 * float(want[name].abs().max()), msg=name
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_layer(backend: str) -> None:
    layer = MoELayer(19, 23, 5, "topk", backend=backend, block=16)
    got = outcome(layer, torch.zeros(2, 0, 19))
    assert got["y"].shape == (2, 0, 19)
    assert not any(value.any() for value in got.values())


def test_a_layer_waits_for_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MoELayer(19, 23, 5, "topk", backend="triton", block=16)
    waits: list[object] = []
    monkeypatch.setattr("moetrain.moe.assignment.Assignment.counts_on_host", waits.append)
    outcome(layer, torch.randn(2, 17, 19))
    assert not waits


@pytest.mark.real
@pytest.mark.usefixtures("training")
@pytest.mark.parametrize("backend", BACKENDS)
def test_three_steps_equal_the_loop(backend: str, corpus: Path, tmp_path: Path) -> None:
    common = ("train.steps=3", "checkpoint.every=3", "experts.block=16", "train.eval_every=0")
    for name in ("loop", backend):
        assert tiny.train(corpus, tmp_path / name, *common, f"experts.backend={name}") == 0
    rows = [tiny.steps(tmp_path / name) for name in ("loop", backend)]
    for want, got in zip(*rows, strict=True):
        assert got["train/loss"] == pytest.approx(want["train/loss"], rel=1e-6)
        assert got["train/grad_norm"] == pytest.approx(want["train/grad_norm"], rel=1e-5)
    (want_tensors, _), (got_tensors, _) = (
        tiny.contents(tiny.checkpoint(tmp_path / n, 3)) for n in ("loop", backend)
    )
    for name, tensor in want_tensors.items():
        if name.startswith("model."):
            torch.testing.assert_close(got_tensors[name], tensor, rtol=0, atol=1e-5, msg=name)
