"""The gated delta rule by chunks against its recurrence, and that against loops over single numbers.

Shapes: B batch, S sequence, N heads, K key width, V value width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moetrain.ops.delta_rule import chunked_delta_rule, recurrent_delta_rule, runs_of

B, S, N, K, V = 2, 23, 3, 5, 7


def inputs(seq: int = S, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, g and beta; keys of length one, some decays of almost nothing and some of all."""
    generator = torch.Generator().manual_seed(seq)

    def draw(*shape: int) -> Tensor:
        return torch.randn(B, seq, N, *shape, generator=generator, dtype=torch.float64)

    k = draw(K)
    g = -(3 * draw()).exp()
    drawn = [draw(K), k / k.norm(dim=-1, keepdim=True), draw(V), g, draw().sigmoid()]
    return [x.to(dtype).requires_grad_() for x in drawn]


def documents(seq: int = S) -> Tensor:
    """Row 0: of lengths that meet no chunk, of one token too; row 1: one document and padding of its own."""
    first = [4] * 2 + [9] * 1 + [4] * 9 + [0] * seq
    return torch.tensor([first[:seq], [7] * (seq - 3) + [0] * 3])


def by_hand(tensors: list[Tensor], docs: Tensor) -> Tensor:
    """One row, head and token at a time, each document by itself."""
    q, k, v, g, beta = (x.detach() for x in tensors)
    y = torch.zeros_like(v)
    for b in range(B):
        for n in range(N):
            for t in range(v.shape[1]):
                if t == 0 or docs[b, t] != docs[b, t - 1]:
                    state = torch.zeros(K, V, dtype=v.dtype)
                state = state * torch.exp(g[b, t, n])
                for j in range(V):
                    known = sum(state[i, j] * k[b, t, n, i] for i in range(K))
                    state[:, j] += k[b, t, n] * beta[b, t, n] * (v[b, t, n, j] - known)
                y[b, t, n] = q[b, t, n] @ state
    return y


@pytest.mark.parametrize("packed", [False, True])
def test_the_recurrence_equals_a_loop(packed: bool) -> None:
    tensors, docs = inputs(), documents()
    runs = runs_of(docs) if packed else None
    y, _ = recurrent_delta_rule(*tensors, runs)
    expected = by_hand(tensors, docs if packed else torch.zeros_like(docs))
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)


def assert_alike(tensors: list[Tensor], chunk: int, runs: Tensor | None, state: Tensor | None) -> None:
    """Output, last state and every gradient."""
    inner = [*tensors, *([] if state is None else [state])]
    results = []
    for y, last in (
        recurrent_delta_rule(*tensors, runs, state),
        chunked_delta_rule(*tensors, runs, state, chunk),
    ):
        loss = (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() + last.square().sum()
        results.append([y, last, *torch.autograd.grad(loss, inner)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 4, 5, 23, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_equal_the_recurrence_with_all_gradients(chunk: int, packed: bool) -> None:
    """A state from before belongs to the first document alone."""
    runs = runs_of(documents()) if packed else None
    state = torch.randn(B, N, K, V, dtype=torch.float64).requires_grad_()
    assert_alike(inputs(), chunk, runs, None)
    assert_alike(inputs(), chunk, runs, state)


def test_a_document_is_computed_as_if_it_were_alone() -> None:
    tensors, docs = inputs(), documents()
    y, _ = chunked_delta_rule(*tensors, runs_of(docs), None, 4)
    for first, end in ((0, 2), (2, 3), (3, 12), (12, S)):
        alone, _ = chunked_delta_rule(*(x[:1, first:end] for x in tensors), None, None, 4)
        torch.testing.assert_close(y[:1, first:end], alone, rtol=1e-11, atol=1e-11)
    changed = [x.detach().clone() for x in tensors]
    for x in changed[:3]:
        x[0, :12] += 5.0
    again, _ = chunked_delta_rule(*changed, runs_of(docs), None, 4)
    torch.testing.assert_close(again[0, 12:], y[0, 12:].detach(), rtol=0, atol=0)


def test_steps_go_on_from_a_state() -> None:
    tensors = inputs()
    whole, last = chunked_delta_rule(*tensors, chunk=5)
    state, ys = None, []
    for first, end in ((0, 9), (9, 10), (10, 22), (22, 23)):
        part = [x[:, first:end] for x in tensors]
        rule = recurrent_delta_rule if end - first == 1 else chunked_delta_rule
        y, state = rule(*part, None, state)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, last, rtol=1e-11, atol=1e-11)


def test_strong_decays_do_not_cancel_in_fp32() -> None:
    """Running sums reach -1e4, and their differences would be off by 1e-3; the pairs' own sums are not."""
    tensors = [x.detach() for x in inputs(131, torch.float32)]
    tensors[3][:, ::2] = -300.0
    tensors[3][:, 1::2] = -0.01
    y, last = chunked_delta_rule(*tensors)
    exact, exact_last = recurrent_delta_rule(*(x.double() for x in tensors))
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(last.double(), exact_last, rtol=0, atol=1e-5)
