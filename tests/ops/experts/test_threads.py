"""Experts on threads of their own: the bits of one thread, forward and backward.

Shapes as in test_operator.py.
"""

from __future__ import annotations

import pytest
import torch
from operator_cases import operands, rows_of
from torch import Tensor

from moetrain.ops import Rows, expert_mlp, gather_sum
from moetrain.ops.cpu import threads

COUNTS = [97, 89, 0, 101, 61, 83, 79, 1]


@pytest.fixture(autouse=True)
def may_start(monkeypatch):
    """Whatever the environment says of OpenMP's threads."""
    monkeypatch.setattr(threads, "_may_start", lambda: True)


def results(
    number: int, rows: Rows, leaves: list[Tensor], dtype: torch.dtype, keep: bool, backend: str = "cpu"
) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        source, weights, up, down = leaves
        out = expert_mlp(source, rows, weights, up, down, "swiglu", backend, dtype, keep)
        y = gather_sum(out, rows.by_source_N, rows.ends_X, rows.ids_R)
        y.square().sum().backward()
    finally:
        torch.set_num_threads(before)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("number", [2, 3])
def test_experts_on_threads_have_the_bits_of_one_thread(number, keep, dtype, monkeypatch):
    monkeypatch.setattr(threads, "_MIN_WORK", 1)
    monkeypatch.setattr(threads, "_UNEVEN", 1.5)
    fits, taken = threads._fits, []
    monkeypatch.setattr(threads, "_fits", lambda *asked: taken.append(fits(*asked)) or taken[-1])
    rows = rows_of(COUNTS, 113, 32)
    leaves = operands(rows, 113, 29, 31, torch.float32)
    alone = results(1, rows, leaves, dtype, keep)
    assert not any(taken)
    together = results(number, rows, leaves, dtype, keep)
    assert taken[-2:] == [True, True]  # forward, backward
    for one, many in zip(alone, together, strict=True):
        assert torch.equal(one, many)


def test_experts_on_threads_equal_the_loop(monkeypatch):
    monkeypatch.setattr(threads, "_MIN_WORK", 1)
    monkeypatch.setattr(threads, "_UNEVEN", 1.5)
    rows = rows_of(COUNTS, 113, 8)
    leaves = operands(rows, 113, 29, 31, torch.float64)
    found = results(2, rows, leaves, torch.float64, True)
    for ours, right in zip(found, results(1, rows, leaves, torch.float64, True, "loop"), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-9)
