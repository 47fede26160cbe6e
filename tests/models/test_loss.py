"""The chunked output projection and cross-entropy against torch's own.

Shapes: B batch, S sequence, D model, V vocabulary.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.models import cross_entropy_sum, token_nll

BATCH, SEQ, WIDTH, VOCAB = 3, 7, 5, 31


def inputs(dtype: torch.dtype, scale: float = 1.0, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = (torch.randn(BATCH, SEQ, WIDTH, dtype=dtype) * scale).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCAB, (BATCH, SEQ)).where(torch.rand(BATCH, SEQ) >= ignored, -100)
    return hidden, weight, labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).reshape(-1, weight.shape[0])
    return F.cross_entropy(logits, labels.reshape(-1), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("chunk", [None, 1, 4, 7, 1000])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_value_and_gradients_equal_the_plain_ones_in_fp64(chunk: int | None, scale: float) -> None:
    hidden, weight, labels = inputs(torch.float64, scale)
    total, count = cross_entropy_sum(hidden, weight, labels, chunk)
    assert total.dtype is torch.float64
    assert count.item() == (labels != -100).sum()
    mine = torch.autograd.grad(3 * total, (hidden, weight))
    theirs = torch.autograd.grad(3 * plain(hidden, weight, labels), (hidden, weight))
    torch.testing.assert_close(total, plain(hidden, weight, labels), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(0, 9), chunk=st.integers(1, 11), share=st.floats(0, 1))
def test_any_chunk_and_any_share_of_ignored_labels(seed: int, rows: int, chunk: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, rows, WIDTH, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.randint(VOCAB, (1, rows), generator=generator)
    labels = labels.where(torch.rand(1, rows, generator=generator) >= share, -100)
    total, _ = cross_entropy_sum(hidden, weight, labels, chunk)
    mine = torch.autograd.grad(total, (hidden, weight))
    theirs = torch.autograd.grad(plain(hidden, weight, labels), (hidden, weight))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_fp32_keeps_a_confident_label_and_a_hopeless_one() -> None:
    """Logits 200 apart: the hopeless label's probability underflows, its loss must not."""
    hidden = torch.eye(3).reshape(1, 3, 3).requires_grad_()
    weight = (torch.eye(3) * 200).requires_grad_()
    total, _ = cross_entropy_sum(hidden, weight, torch.tensor([[0, 0, 0]]))
    torch.testing.assert_close(total, torch.tensor(400.0))
    total.backward()
    torch.testing.assert_close(hidden.grad[0, 0], torch.zeros(3))
    torch.testing.assert_close(hidden.grad[0, 1], torch.tensor([-200.0, 200.0, 0.0]))


def test_bf16_autocast_gives_sums_as_near_to_fp64_as_torchs() -> None:
    hidden, weight, labels = inputs(torch.float32)
    exact = plain(hidden.double(), weight.double(), labels)
    exact_grads = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = cross_entropy_sum(hidden, weight, labels, 4)
        theirs = plain(hidden, weight, labels)
    assert total.dtype is torch.float32
    assert abs(total - exact) <= 1.05 * abs(theirs - exact) + 1e-6
    grads, their_grads = (torch.autograd.grad(loss, (hidden, weight)) for loss in (total, theirs))
    for mine, other, right in zip(grads, their_grads, exact_grads, strict=True):
        assert mine.dtype is torch.float32
        assert (mine - right).norm() <= 1.2 * (other - right).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_token_nll_sums_to_the_loss_and_needs_no_graph(dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs(dtype)
    nll = token_nll(hidden, weight, labels, 4)
    assert nll.shape == labels.shape
    assert not nll.requires_grad
    assert not nll[labels == -100].any()
    logits = F.linear(hidden, weight).reshape(-1, VOCAB)
    each = F.cross_entropy(logits, labels.reshape(-1), reduction="none").view_as(labels)
    torch.testing.assert_close(nll, each.detach())
    with torch.no_grad():
        total, count = cross_entropy_sum(hidden, weight, labels, 4)
    torch.testing.assert_close(total, nll.sum())
    assert count == (labels != -100).sum()


def test_gradients_where_needed_and_a_second_backward_agrees() -> None:
    hidden, weight, labels = inputs(torch.float64)
    total, _ = cross_entropy_sum(hidden.detach(), weight, labels, 4)
    torch.testing.assert_close(
        torch.autograd.grad(total, weight)[0], torch.autograd.grad(plain(hidden, weight, labels), weight)[0]
    )
    total, _ = cross_entropy_sum(hidden, weight, labels, 4)
    first = torch.autograd.grad(total, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, hidden)[0])


def test_shapes_that_differ_and_a_chunk_of_nothing_are_refused() -> None:
    hidden, weight, labels = inputs(torch.float32)
    with pytest.raises(ValueError, match="labels are"):
        cross_entropy_sum(hidden, weight, labels[:, 1:])
    with pytest.raises(ValueError, match="at least 1 row"):
        token_nll(hidden, weight, labels, 0)


def test_no_logits_of_the_whole_batch_are_ever_held() -> None:
    """The largest tensor made, forward and backward, is a chunk's logits or the weight's gradient."""
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)
            )
            return out

    hidden = torch.randn(1, 60, WIDTH, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
    with Watch():
        cross_entropy_sum(hidden, weight, torch.randint(VOCAB, (1, 60)), 7)[0].backward()
    assert max(sizes) <= max(7 * VOCAB, 60 * WIDTH)
