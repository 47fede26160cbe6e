"""The self-test of an attention backend on this device, once a process, against the formula.

Shapes: B batch, S queries, K keys, Q query heads, G key and value heads, H head width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from moetrain.ops.attention.case import Case
from moetrain.ops.attention.seen_keys import SeenKeys

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Case], Tensor]
_ROWS, _SEQ, _WINDOW = 2, 521, 300  # several blocks of any backend
_ENDS = ((521, 521), (130, 407))  # of the documents of the two rows
_NAMES = ("queries", "keys", "values", "sinks")
_ROUNDINGS = 16  # a wrong mask changes values by far more
_COARSEST = 2**-10  # an accelerator may take products of fp32 in ten bits


def written_out(
    q_BQSH: Tensor, k_BGKH: Tensor, v_BGKH: Tensor, seen: SeenKeys | None, sinks_Q: Tensor | None = None
) -> Tensor:
    """Attention [B, S, Q, H] by the formula, with the scores of all pairs."""
    seq, repeats = q_BQSH.shape[2], q_BQSH.shape[1] // k_BGKH.shape[1]
    k_BQKH, v_BQKH = k_BGKH.repeat_interleave(repeats, 1), v_BGKH.repeat_interleave(repeats, 1)
    bias = (seen or SeenKeys(seq)).bias(0, seq, 0, q_BQSH.dtype, q_BQSH.device)
    scores_BQSK = q_BQSH @ k_BQKH.transpose(2, 3) / q_BQSH.shape[3] ** 0.5 + bias
    if sinks_Q is not None:
        sinks_BQS1 = sinks_Q[:, None, None].expand(*scores_BQSK.shape[:3], 1)
        scores_BQSK = torch.cat([scores_BQSK, sinks_BQS1], 3)
    y_BQSH: Tensor = scores_BQSK.softmax(-1)[..., : k_BGKH.shape[2]] @ v_BQKH
    return y_BQSH.transpose(1, 2)


def failure(attend: Attend, case: Case) -> str | None:
    """What is wrong with a backend's output or gradients, as a phrase; None if they are right up to rounding.

    It runs in a thread of its own, free of the caller's autocast, inference mode, tracing and counting.
    """
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(_failure(attend, _small(case))))
    thread.start()
    thread.join()
    return found[0] if found else "its self-test was interrupted"


def _small(case: Case) -> Case:
    ids_BS = torch.stack([(torch.arange(_SEQ)[:, None] >= torch.tensor(ends)).sum(1) for ends in _ENDS])
    seen = SeenKeys(_SEQ, 0, _WINDOW, ids_BS.to(case.device), documents=3)
    heads = (2 * case.heads[0] // case.heads[1], 2)
    return replace(case, seen=seen, batch=_ROWS, seq=_SEQ, cached=0, heads=heads)


def _failure(attend: Attend, case: Case) -> str | None:
    try:
        with torch.cuda.device(case.device) if case.device.type == "cuda" else nullcontext():
            inputs, dy = _inputs(case)
            found = _with_gradients(lambda q, k, v, sinks=None: attend(q, k, v, sinks, case), inputs, dy)
        seen = None if case.seen is None else _on_cpu(case.seen)
        wide = [x.detach().cpu().double().requires_grad_() for x in inputs]
        right = _with_gradients(
            lambda q, k, v, sinks=None: written_out(q, k, v, seen, sinks), wide, dy.cpu().double()
        )
        names = ["output", *(f"gradient of the {what}" for what in _NAMES[: len(inputs)])]
        bound = _ROUNDINGS * max(torch.finfo(case.dtype).eps, _COARSEST)
        for name, ours, theirs in zip(names, found, right, strict=True):
            off = float(((ours.cpu().double() - theirs).abs().max() / theirs.abs().max()).detach())
            if not off <= bound:
                return f"its {name} is off by {off:.2g} of the largest value in a self-test"
    except Exception as error:  # a compiler, a driver or a kernel: whatever is missing or broken
        return f"its self-test failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def _inputs(case: Case) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.device, case.dtype)

    inputs = [draw(_ROWS, n, _SEQ, case.width).requires_grad_() for n in (*case.heads, case.heads[1])]
    if case.sinks:
        inputs.append(draw(case.heads[0]).requires_grad_())
    return inputs, draw(_ROWS, _SEQ, case.heads[0], case.width)


def _with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, inputs, dy)]


def _on_cpu(seen: SeenKeys) -> SeenKeys:
    return replace(seen, doc_ids_BS=None if seen.doc_ids_BS is None else seen.doc_ids_BS.cpu())
