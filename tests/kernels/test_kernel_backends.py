"""The experts' Triton backends in the layer and in training, by Triton's interpreter: equal to ``loop``.

Shapes: B batch, S sequence, D model.
"""

from __future__ import annotations

import sys
from pathlib import Path

import interpreted  # noqa: F401  before any kernel
import pytest
import torch
from torch import Tensor

from moetrain.moe import MoELayer
from moetrain.moe.context import RouterContext
from moetrain.moe.options import Keep
from moetrain.ops.experts import table
from moetrain.parallel.precision import round_for_inference

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import kept

BACKENDS = ["triton", "triton_block_sparse"]


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A self-test takes seconds in the interpreter; it is tested elsewhere."""
    monkeypatch.setattr(table, "_self_test", lambda name, case: None)


def outcome(layer: MoELayer, x_BSD: Tensor) -> dict[str, Tensor]:
    x_BSD = x_BSD.detach().clone().requires_grad_()
    y_BSD, _ = layer(x_BSD, RouterContext.default(*x_BSD.shape[:2], x_BSD.device))
    cotangent = torch.linspace(-1, 2, y_BSD.numel(), dtype=y_BSD.dtype).view(y_BSD.shape).to(y_BSD.device)
    named = dict(layer.named_parameters())
    grads = torch.autograd.grad((y_BSD * cotangent).sum(), [x_BSD, *named.values()])
    return {"y": y_BSD.detach(), "x": grads[0], **dict(zip(named, grads[1:], strict=True))}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("router", "block"),
    [("topk", 16), ("topk", 32), ("topk", 128), ("expert_choice", 16), ("relu", 16), ("moepp", 16)],
)
def test_a_layer_equals_the_loop(router: str, block: int, backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    layer = MoELayer(
        19, 23, 5, router, activation="swiglu", backend="loop", num_shared_experts=1, block=block
    )
    layer, x_BSD = layer.to(device), torch.randn(2, 17, 19).to(device)
    want = outcome(layer, x_BSD)
    layer.use_backend(backend)
    for name, value in outcome(layer, x_BSD).items():
        torch.testing.assert_close(
            value, want[name], rtol=1e-5, atol=1e-5 * float(want[name].abs().max()), msg=name
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_kept_is_computed_to_the_same_bits(backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    layer = MoELayer(19, 23, 5, "topk", activation="swiglu", backend=backend, block=16)
    layer, x_BSD = layer.to(device), torch.randn(2, 17, 19).to(device)
    kept = outcome(layer, x_BSD)
    layer.experts.keep = Keep.inputs
    for name, value in outcome(layer, x_BSD).items():
        assert torch.equal(value, kept[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_layer(backend: str, device: torch.device) -> None:
    layer = MoELayer(19, 23, 5, "topk", backend=backend, block=16).to(device)
    got = outcome(layer, torch.zeros(2, 0, 19, device=device))
    assert got["y"].shape == (2, 0, 19)
    assert not any(value.any() for value in got.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_keeps_no_more_than_its_bound(backend: str, device: torch.device) -> None:
    sizes = kept.Layer(29, 19, 23, 5, 2, 16, torch.bfloat16)
    layer = MoELayer(19, 23, 5, "topk", backend=backend, block=16).to(device)
    round_for_inference(layer, sizes.dtype)
    x_BSD = torch.randn(1, 29, 19, device=device).to(sizes.dtype).requires_grad_()
    found, bound = sizes.parts(kept.kept_storages(lambda: layer(x_BSD)[0], layer)), sizes.bound()
    assert set(found) == set(kept.PARTS)
    assert all(0 < found[part] <= bound[part] for part in kept.PARTS), (found, bound)


def test_a_layer_waits_for_no_count(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    layer = MoELayer(19, 23, 5, "topk", backend="triton", block=16).to(device)
    waits: list[object] = []
    monkeypatch.setattr("moetrain.moe.assignment.Assignment.counts_on_host", waits.append)
    outcome(layer, torch.randn(2, 17, 19).to(device))
    assert not waits


@pytest.mark.real
@pytest.mark.usefixtures("training")
@pytest.mark.parametrize("backend", BACKENDS)
def test_three_steps_equal_the_loop(backend: str, corpus: Path, tmp_path: Path) -> None:
    import tiny  # the whole trainer, which the other tests do without

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
