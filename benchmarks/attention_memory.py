"""Bytes that attention allocates, forward plus backward, and its largest tensor, by backend and length.

    python benchmarks/attention_memory.py [--lengths 8192 16384] [--out FILE]

One sequence of 40 documents, or with a window; 8 heads, 2 of keys, 64 wide, bf16, on the CPU. "blocks" and
"sdpa" are computed; "flex" has fake tensors (shapes without memory): its block mask and what FlexAttention's
operators return. Kernels' own memory is not counted: FlexAttention's compiled backward pass adds one fp32
number a query and head.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from timing import write_json
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moetrain.ops.attention import BACKENDS, Case, SeenKeys, attend
from moetrain.ops.attention import flex as flex_backend

LENGTHS = (8192, 16384, 32768, 65536)
DOCUMENTS, WINDOW = 40, 1024
COUNTED = ("blocks", "flex", "sdpa")
HEADS, WIDTH = (8, 2), 64


@dataclass(frozen=True)
class Count:
    """``peak`` and ``total`` bytes of what operators made; ``largest``: elements of the largest tensor."""

    peak: int
    total: int
    largest: int


class Made(TorchDispatchMode):
    """Counts the storages that operators make, and those of them that live at once."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for x in _tensors(result):
            storage = x.untyped_storage()
            if storage._cdata not in given:
                given.add(storage._cdata)
                self.total += storage.nbytes()
                self.largest = max(self.largest, storage.nbytes() // x.element_size())
                self._lives(storage.nbytes())
                weakref.finalize(storage, self._lives, -storage.nbytes())
        return result

    def _lives(self, nbytes: int) -> None:
        self.live += nbytes
        self.peak = max(self.peak, self.live)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, Tensor))


def flex_operator(
    q_BQSH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, block_mask: BlockMask, enable_gqa: bool
) -> Tensor:
    """FlexAttention's operator, which torch.compile makes a kernel of; real tensors go pair by pair."""
    scale = q_BQSH.shape[-1] ** -0.5
    mask = block_mask.as_tuple()
    y_BQSH: Tensor = torch.ops.higher_order.flex_attention(q_BQSH, k_BGSH, v_BGSH, _same, mask, scale, {})[0]
    return y_BQSH


def _same(score: Tensor, *where: Tensor) -> Tensor:
    return score


def documents(seq: int, length: int) -> SeenKeys:
    """Each of ``length`` tokens."""
    return SeenKeys(seq, doc_ids_BS=(torch.arange(seq) // length)[None])


KINDS: dict[str, Callable[[int], SeenKeys]] = {
    "documents": lambda seq: documents(seq, -(-seq // DOCUMENTS)),
    "window": lambda seq: SeenKeys(seq, window=WINDOW),
}


def counted(
    backend: str,
    kind: Callable[[int], SeenKeys],
    seq: int,
    heads: tuple[int, int] = HEADS,
    width: int = WIDTH,
    dtype: torch.dtype = torch.bfloat16,
) -> Count:
    """Of one plan, one forward and one backward pass of a sequence, inputs not included."""
    patched = mock.patch.object(flex_backend, "kernel", return_value=flex_operator)
    with patched, FakeTensorMode() if backend == "flex" else nullcontext():
        q, k, v = (torch.randn(1, n, seq, width, dtype=dtype).requires_grad_() for n in (*heads, heads[1]))
        dy = torch.randn(1, seq, heads[0], width, dtype=dtype)
        case = Case(kind(seq), 1, seq, 0, heads, width, dtype, q.device)
        with Made() as made:
            plan = BACKENDS[backend].prepare(case)
            torch.autograd.grad(attend(q, k, v, plan), (q, k, v), dy)
    return Count(made.peak, made.total, made.largest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--out")
    args = parser.parse_args()
    cases = []
    for kind in KINDS:
        for backend in COUNTED:
            for seq in args.lengths:
                count = counted(backend, KINDS[kind], seq)
                cases.append({"kind": kind, "backend": backend, "tokens": seq} | asdict(count))
                print(
                    f"{kind:9} {backend:6} {seq:6} tokens {count.peak / 2**20:7.1f} MiB at once, "
                    f"{count.total / 2**20:7.1f} in all, "
                    f"largest tensor {count.largest:12,} elements of {seq * seq:,} pairs"
                )
    write_json(args.out, {"cases": cases})


if __name__ == "__main__":
    main()
