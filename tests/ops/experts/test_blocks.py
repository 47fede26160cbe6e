"""The rows of a block: by the mean rows of an expert on an accelerator, known without looking at counts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.moe import MoELayer
from moetrain.moe.context import RouterContext
from moetrain.ops.experts import blocks
from moetrain.ops.experts.blocks import usual_block

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from pretended_device import DEVICE, pretended_device, waits_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def block(assignments: int, experts: int, dtype: torch.dtype = torch.bfloat16) -> int:
    return usual_block(GPU, dtype, assignments, experts)


def test_the_least_that_holds_the_mean_rows() -> None:
    found = [block(n, 7) for n in (0, 7 * 16, 7 * 16 + 1, 7 * 32, 7 * 64, 7 * 64 + 1, 7 * 1009)]
    assert found == [16, 16, 32, 32, 64, 128, 128]
    assert block(7 * 1009, 7, torch.float32) == 64  # exact fp32 has tiles of 64 rows at most
    assert block(0, 0) == 16


def test_few_values_whatever_the_number_of_assignments() -> None:
    assert {block(n, 5) for n in range(2000)} == {16, 32, 64, 128}
    assert {usual_block(CPU, torch.bfloat16, n, 5) for n in (0, 1, 10**6)} == {32}


def test_a_traced_layer_does_not_look_at_assignments() -> None:
    torch._dynamo.reset()
    traced = torch.compile(
        lambda ids_N: ids_N.new_zeros(block(ids_N.shape[0], 5)), backend="eager", fullgraph=True, dynamic=True
    )
    assert {traced(torch.empty(n)).shape[0] for n in (3, 70, 500)} == {128}


@pytest.mark.parametrize("tokens", [3, 97, 499])
def test_on_an_accelerator_nothing_waits_nor_changes(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer on the pretended device: the chosen block, against one of 128 as asked for."""
    torch.manual_seed(0)
    layer = MoELayer(16, 16, 5, "topk", router_options={"top_k": 2}).bfloat16()
    x_BSD = torch.randn(1, tokens, 16).bfloat16()
    chosen: list[int] = []
    real = blocks.rows_of_tile
    monkeypatch.setattr(blocks, "rows_of_tile", lambda *of: chosen.append(real(*of)) or chosen[-1])

    def outcome(asked: int | None) -> tuple[Tensor, int]:
        layer.dispatcher.block = asked
        with pretended_device() as pretence:
            moved, on_device_BSD = layer.to(DEVICE), x_BSD.to(DEVICE)
            ctx = RouterContext.default(1, tokens, DEVICE)
            pretence.sites.clear()
            y_BSD, _ = moved(on_device_BSD, ctx)
            waits = waits_of(pretence.sites)
            return y_BSD.detach().cpu(), waits

    (y, waits), (want, of_128) = outcome(None), outcome(128)
    assert chosen[-1] == {3: 16, 97: 64, 499: 128}[tokens]
    assert waits == of_128 == 0
    torch.testing.assert_close(y, want)
