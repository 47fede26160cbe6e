"""What routing costs: every router's forward pass, from tokens to sorted assignment, against a whole layer.

    python benchmarks/routers.py [--repetitions 15] [--out FILE]

Routers are in training mode, with 8 experts a token where they have such an option. The layer is top-k's,
forward plus backward, timed in the same interleaved pass on the same tokens. Counted besides: the largest
tensor that routing makes, in bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from timing import interleaved, machine, medians, write_json
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moetrain.moe import ROUTERS, MoELayer, Router, RouterContext, build_router

BATCH, SEQ, WIDTH, HIDDEN, EXPERTS, TOP_K = 4, 2048, 512, 256, 64, 8
LAYER = "whole layer, topk"
EIGHT: dict[str, Any] = {"top_k": TOP_K, "eval_top_k": TOP_K, "experts_per_token": float(TOP_K)}


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes; views of ``given`` are none."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.bytes, self._given = 0, given.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        made = [t for t in made if t.untyped_storage().data_ptr() != self._given]
        self.bytes = max([self.bytes, *(t.numel() * t.element_size() for t in made)])
        return out


def build(name: str) -> Router:
    known = {field.name for field in fields(ROUTERS[name].options)}
    one_only = name in ("switch",)  # its options are top-k's, but it is defined by k = 1
    options = {key: value for key, value in EIGHT.items() if key in known and not one_only}
    torch.manual_seed(0)
    return build_router(name, d_model=WIDTH, num_experts=EXPERTS, **options)


def variants() -> dict[str, Router]:
    routers = {name: build(name) for name in sorted(ROUTERS)}
    routers["base, auction"] = build_router("base", d_model=WIDTH, num_experts=EXPERTS, solver="auction")
    return routers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.manual_seed(1)
    data = [torch.randn(BATCH, SEQ, WIDTH) for _ in range(args.repetitions + 1)]
    ids = torch.randint(0, 4096, (BATCH * SEQ,))
    ctx = RouterContext(BATCH, SEQ, torch.arange(BATCH), token_ids_T=ids)
    layer = MoELayer(WIDTH, HIDDEN, EXPERTS, router_options={"top_k": TOP_K})
    grad = torch.randn(BATCH, SEQ, WIDTH)

    def whole(repetition: int) -> None:
        layer.zero_grad(set_to_none=True)
        y, _ = layer(data[repetition].clone().requires_grad_(), ctx)
        y.backward(grad)

    def route(router: Router, repetition: int) -> None:
        router(data[repetition].view(-1, WIDTH), ctx)

    routers = variants()
    steps: dict[str, Callable[[int], None]] = {LAYER: whole}
    steps |= {name: partial(route, router) for name, router in routers.items()}
    middle = medians(interleaved(steps, args.repetitions))
    result: dict[str, Any] = {"machine": machine(), "repetitions": args.repetitions, "routers": {}}
    print(result["machine"])
    scores = BATCH * SEQ * EXPERTS * 4
    print(f"{LAYER}: {1e3 * middle[LAYER]:.0f} ms forward + backward; fp32 scores are {scores:,} bytes")
    for name, router in routers.items():
        with Largest(data[0]) as largest:
            routing = router(data[0].view(-1, WIDTH), ctx)
        row = {
            "ms": 1e3 * middle[name],
            "percent_of_layer": 100 * middle[name] / middle[LAYER],
            "experts_per_token": float(routing.assignment.counts_E.sum()) / (BATCH * SEQ),
            "largest_tensor_bytes": largest.bytes,
        }
        result["routers"][name] = row
        print(
            f"  {name:18} {row['ms']:8.1f} ms  {row['percent_of_layer']:6.1f} % of the layer  "
            f"{row['experts_per_token']:5.1f} experts a token  largest tensor {largest.bytes:12,} bytes"
        )
    write_json(args.out, result)


if __name__ == "__main__":
    main()
