"""torch's variable-length attention: every document is a sequence of its own, and windows are the kernel's.

The kernel wants the ends of the documents. Their number is the host's knowledge (``SeenKeys.documents``, from
whoever packed them), so that no one waits for the device to count them.

Shapes: B batch, S positions, T = B S tokens, N documents, Q query heads, G key and value heads, H head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moetrain.ops.attention.case import NO_SINKS, Case, Plan, Runs
from moetrain.ops.attention.seen_keys import SeenKeys

_DTYPES = (torch.bfloat16, torch.float16)
_OPTIONS = ("window_size", "enable_gqa")


def refusal(case: Case) -> str | None:
    if case.device.type != "cuda":
        return f"its kernel is CUDA's, and the device is {case.device.type}"
    if case.dtype not in _DTYPES:
        return f"its kernel takes bf16 or fp16, not {str(case.dtype).removeprefix('torch.')}"
    if case.sinks:
        return NO_SINKS
    if _function() is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen with {' and '.join(_OPTIONS)}"
    if case.cached:
        return "a query and its cached keys are no sequence of equal lengths"
    if case.seen is not None and case.seen.doc_ids_BS is not None and case.seen.documents is None:
        return "the number of documents in a row is not known on the host"
    return None


def worthwhile(case: Case) -> bool:
    return case.seen is not None


def prepare(case: Case) -> Plan:
    seen = case.seen or SeenKeys(case.seq)
    return Plan("varlen", seen, runs=runs(seen, case.batch, case.device))


def attend(
    q_BQSH: Tensor, k_BGKH: Tensor, v_BGKH: Tensor, plan: Plan, sinks_Q: Tensor | None = None
) -> Tensor:
    if sinks_Q is not None:
        raise ValueError(NO_SINKS)
    kernel, seen, ends = _function(), plan.seen, plan.runs
    if kernel is None or seen is None or ends is None:
        raise ValueError(f"{plan} is no plan of the varlen backend, or torch {torch.__version__} lacks it")
    left = -1 if seen.window is None else seen.window - 1  # a window counts the query's own token
    q_TQH, k_TGH, v_TGH = (x.transpose(1, 2).flatten(0, 1) for x in (q_BQSH, k_BGKH, v_BGKH))
    y_TQH: Tensor = kernel(
        q_TQH, k_TGH, v_TGH, ends.ends_N1, ends.ends_N1, ends.longest, ends.longest,
        window_size=(left, 0), enable_gqa=q_BQSH.shape[1] != k_BGKH.shape[1],
    )  # fmt: skip
    y_BSQH: Tensor = y_TQH.unflatten(0, (-1, q_BQSH.shape[2]))
    return y_BSQH


def runs(seen: SeenKeys, batch: int, device: torch.device) -> Runs:
    """The documents of all rows: ``seen.documents`` a row at most. The host does not look at their ids."""
    tokens = batch * seen.seq
    if seen.doc_ids_BS is None:
        ends = torch.arange(0, tokens + 1, seen.seq, dtype=torch.int32, device=device)
        return Runs(ends, seen.seq)
    if seen.documents is None:
        raise ValueError("the number of documents in a row must be known on the host")
    begins_BS = torch.ones_like(seen.doc_ids_BS, dtype=torch.bool)
    torch.ne(seen.doc_ids_BS[:, 1:], seen.doc_ids_BS[:, :-1], out=begins_BS[:, 1:])
    places_T = torch.arange(tokens, dtype=torch.int32, device=device)
    starts_T = torch.where(begins_BS.flatten(), places_T, tokens).sort().values
    last_1 = torch.full((1,), tokens, dtype=torch.int32, device=device)
    starts_N = starts_T[: min(tokens, batch * seen.documents)]
    return Runs(torch.cat([starts_N, last_1]), seen.seq)


@cache
def _function() -> Callable[..., Tensor] | None:
    """torch's, if it has what is needed here."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    found: Callable[..., Any] = varlen_attn  # returns more than a tensor on request
    return found if all(option in known for option in _OPTIONS) else None
