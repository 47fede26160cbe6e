"""What a layer costs in which experts compete: time and live memory, against top-k and all experts at once.

    python benchmarks/competition.py [--repetitions 7] [--out FILE]

One layer of 2048 tokens of width 256, 16 experts of 128, 2 a token, forward plus backward, in fp32. Memory is
that of live tensors that operations made: after the forward pass, and the most of forward and backward.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timing import interleaved, machine, medians, write_json
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moetrain.moe import MoELayer, RouterContext

BATCH, SEQ, WIDTH, HIDDEN, EXPERTS, TOP_K = 4, 512, 256, 128, 16, 2
ALWAYS: dict[str, Any] = {"top_k": TOP_K, "rate": 1.0}
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("topk", {"top_k": TOP_K}),
    "competesmoe": ("competesmoe", ALWAYS),
    "competesmoe, no diversity": ("competesmoe", ALWAYS | {"diversity_coef": 0.0}),
    "competesmoe_v1": ("competesmoe_v1", ALWAYS),
    "dense": ("dense", {}),
}


class Live(TorchDispatchMode):
    """Bytes of the storages that operations made and that are alive: ``now``, and the ``most``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for made in (t for t in tree_leaves(out) if isinstance(t, Tensor)):
            storage = made.untyped_storage()
            if storage._cdata not in given | self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def build(name: str, options: dict[str, Any]) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(WIDTH, HIDDEN, EXPERTS, router=name, router_options=options)


def both(layer: MoELayer, x: Tensor, grad: Tensor, between: Callable[[], None] = lambda: None) -> None:
    layer.zero_grad(set_to_none=True)
    y, routing = layer(x.clone().requires_grad_(), RouterContext.default(BATCH, SEQ))
    loss = (y * grad).sum() if routing.penalty is None else (y * grad).sum() + routing.penalty
    between()
    loss.backward()


def memory(layer: MoELayer, x: Tensor, grad: Tensor) -> tuple[int, int]:
    """(after the forward pass, the most) in bytes."""
    kept: list[int] = []
    with Live() as live:
        both(layer, x, grad, lambda: kept.append(live.now))
    return kept[0], live.most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.manual_seed(1)
    data = [torch.randn(BATCH, SEQ, WIDTH) for _ in range(args.repetitions + 1)]
    grad = torch.randn(BATCH, SEQ, WIDTH)
    layers = {name: build(*of) for name, of in LAYERS.items()}

    def run(layer: MoELayer, repetition: int) -> None:
        both(layer, data[repetition], grad)

    times = medians(interleaved({n: partial(run, layer) for n, layer in layers.items()}, args.repetitions))
    sizes = {name: memory(layer, data[0], grad) for name, layer in layers.items()}
    print(f"{'layer':<26}{'ms':>9}{'of topk':>9}{'kept MiB':>10}{'most MiB':>10}")
    for name, seconds in times.items():
        kept, most = (size / 2**20 for size in sizes[name])
        ratio = seconds / times["topk"]
        print(f"{name:<26}{seconds * 1e3:>9.1f}{ratio:>9.2f}{kept:>10.2f}{most:>10.2f}")
    if args.out:
        write_json(args.out, {"machine": machine(), "seconds": times, "bytes": sizes})


if __name__ == "__main__":
    main()
