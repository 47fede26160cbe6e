"""Attention sinks: a logit of each head in the softmax, of no key, against the formula in fp64.

Shapes: B batch, S sequence, K keys, Q query heads, G key and value heads, H head width.
"""

import pytest
import torch
from attention_cases import CPU as HERE
from attention_cases import KINDS, all_pairs, case_of, inputs, seen_of
from torch import Tensor

from moetrain.ops.attention import Case, SeenKeys, attend, plan_attention, refusal
from moetrain.ops.attention.blocks import CPU, Kernel, attend_by_blocks
from moetrain.ops.attention.sdpa import FORMULA
from moetrain.ops.attention.self_test import written_out

KERNELS = {"blocks": CPU, "sdpa": FORMULA}
GPU = torch.device("cuda", 0)


def sinks(heads: int = 6) -> Tensor:
    """Of heads that see almost nothing but it, and of heads that see nothing of it."""
    return torch.linspace(-4, 9, heads, dtype=torch.float64).requires_grad_()


def by_hand(q: Tensor, k: Tensor, v: Tensor, sinks_Q: Tensor, seen: SeenKeys | None) -> Tensor:
    """exp(score) v over exp(sink) and all exp(score), pair by pair masked."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    weights = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).exp() * all_pairs(seen, q.shape[2])
    return (weights @ v / (weights.sum(-1, keepdim=True) + sinks_Q.exp()[:, None, None])).transpose(1, 2)


def assert_by_hand(found: Tensor, expected: Tensor, leaves: list[Tensor], tolerance: float = 1e-12) -> None:
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grads = [torch.autograd.grad(y, leaves, dy.to(y.dtype)) for y in (found, expected)]
    for ours, right in zip((found, *grads[0]), (expected, *grads[1]), strict=True):
        torch.testing.assert_close(ours, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_output_and_gradients_are_the_formula(kernel: Kernel, kind: str) -> None:
    """Several blocks of queries, several heads of queries a key."""
    tensors, seen = [*inputs(37, 2), sinks()], seen_of(kind, 37)
    *qkv, sinks_Q = tensors
    found = attend_by_blocks(*qkv, seen or SeenKeys(37), 16, kernel, sinks_Q)
    assert_by_hand(found, by_hand(*tensors, seen), tensors)


@pytest.mark.parametrize("seq", [1, 37])
def test_the_backend_that_takes_all_takes_sinks_with_a_cache(seq: int) -> None:
    *_, k, v = inputs(41, 3)
    tensors, seen = [inputs(41, 3)[0][:, :, -seq:], k, v, sinks()], SeenKeys(seq, 41 - seq)
    case = _with_sinks(case_of(tensors, None if seq == 1 else seen))
    found = attend(*tensors[:3], plan_attention("auto", case), tensors[3])
    whole = by_hand(inputs(41, 3)[0], k, v, tensors[3], None)
    torch.testing.assert_close(found, whole[:, -seq:], rtol=1e-12, atol=1e-12)


def test_a_sink_far_below_the_scores_changes_nothing() -> None:
    tensors, seen = inputs(23, 6), seen_of("window", 23)
    low = torch.full((6,), -1e4, dtype=torch.float64)
    for kernel in KERNELS.values():
        found = attend_by_blocks(*tensors, seen or SeenKeys(23), 8, kernel, low)
        torch.testing.assert_close(found, written_out(*tensors, seen), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel", "bound"), [(CPU, 0.03), (FORMULA, 0.008)])
def test_in_bf16_it_is_near_the_formula(kernel: Kernel, bound: float) -> None:
    """The formula is computed in fp32, and only its output is rounded."""
    narrow = [x.detach().to(torch.bfloat16) for x in (*inputs(31, 2), sinks())]
    expected = by_hand(*(x.double() for x in narrow), None)
    found = attend_by_blocks(*narrow[:3], SeenKeys(31), 16, kernel, narrow[3])
    assert found.dtype is torch.bfloat16
    assert (found.double() - expected).abs().max() < bound


def _with_sinks(case: Case) -> Case:
    return Case(**{**vars(case), "sinks": True})


def test_backends_without_sinks_refuse_and_the_next_is_taken() -> None:
    seen = SeenKeys(4096, window=128)
    on_gpu = Case(seen, 2, 4096, 0, (6, 2), 16, torch.bfloat16, GPU, sinks=True)
    for name in ("flex", "varlen"):
        assert "it has no sinks (model.attention_sinks)" in str(refusal(name, on_gpu, tested=False))
    assert plan_attention("auto", on_gpu).backend == "sdpa"
    on_cpu = Case(seen, 2, 4096, 0, (6, 2), 16, torch.float32, HERE, sinks=True)
    assert plan_attention("auto", on_cpu).backend == "blocks"  # its self-test is with sinks, too
