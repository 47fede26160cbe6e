"""A layer in one graph: whatever routers choose, it is traced once, and computes what it does untraced.

Shapes: B batch, S sequence, D model.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from moetrain.compat import compiles_gradients
from moetrain.moe import MoELayer
from moetrain.moe.options import Keep

BATCHES = 50


@pytest.fixture(autouse=True)
def nothing_traced() -> None:
    torch._dynamo.reset()


def gradients(layer: MoELayer, y_BSD: Tensor) -> list[Tensor]:
    cotangent = torch.linspace(-1, 2, y_BSD.numel()).view(y_BSD.shape)
    return list(
        torch.autograd.grad((y_BSD * cotangent).sum(), list(layer.parameters()), materialize_grads=True)
    )


@pytest.mark.skipif(not compiles_gradients(torch.__version__), reason="this torch compiles gradients wrongly")
@pytest.mark.parametrize(
    ("router", "keep"),
    [
        ("topk", Keep.preactivation),
        ("topk", Keep.inputs),
        ("expert_choice", Keep.preactivation),
        ("relu", Keep.preactivation),
    ],
)
def test_one_graph_whatever_the_counts(router: str, keep: Keep) -> None:
    torch.manual_seed(0)
    layer = MoELayer(16, 24, 5, router, num_shared_experts=1, keep=keep)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    loads = set()
    for number in range(BATCHES):
        x_BSD = torch.randn(2, 32, 16)
        y_BSD, routing = compiled(x_BSD)
        loads.add(tuple(routing.assignment.counts_E.tolist()))
        got = [y_BSD, *gradients(layer, y_BSD)]
        if number % 10 == 0:
            want_BSD, _ = layer(x_BSD)
            want = [want_BSD, *gradients(layer, want_BSD)]
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    assert len(loads) == (1 if router == "expert_choice" else BATCHES)
