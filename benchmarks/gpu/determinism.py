"""Whether an MoE layer has the same bits in every run: outputs and all gradients, on each rung of the ladder.

    python benchmarks/gpu/determinism.py [--device cuda] [--runs 20] [--shapes A B C] [--out FILE]

Exits with 1 where two runs differ.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from memory import DTYPES, rungs
from peers import OURS, SHAPES, TINY, Shape, call, cast, moe_layer, ours
from timing import device_of, machine, write_json
from torch import Tensor, nn

from moetrain.ops.experts.blocks import usual_block


def bits(layer: nn.Module, x: Tensor, precision: str) -> list[Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    leaves = [x.detach().requires_grad_(), *layer.parameters()]
    y = call(layer, leaves[0], precision)
    cotangent = torch.linspace(-1, 2, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]


def differing(layer: nn.Module, x: Tensor, precision: str, runs: int) -> list[str]:
    """The names of the tensors that differ from the first run's in any other."""
    names = ["output", "input", *(name for name, _ in layer.named_parameters())]
    first, found = bits(layer, x, precision), set[str]()
    for _ in range(runs - 1):
        again = bits(layer, x, precision)
        found |= {name for name, a, b in zip(names, first, again, strict=True) if not torch.equal(a, b)}
    return sorted(found)


def measure(shape: Shape, precision: str, device: str, runs: int) -> dict[str, list[str] | None]:
    """Of each rung what differs; None where this device does not have it."""
    torch.manual_seed(0)
    layer = cast(ours(shape).to(device), precision)
    x = torch.randn(2, shape.tokens // 2, shape.d_model, device=device).to(DTYPES[precision])
    found: dict[str, list[str] | None] = {}
    block = usual_block(x.device, DTYPES[precision], shape.tokens * shape.top_k, shape.experts)
    for name, reason in rungs(shape, device, DTYPES[precision], block).items():
        moe_layer(layer).use_backend(name)
        found[name] = differing(layer, x, precision, runs) if reason is None else None
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=[*SHAPES, *TINY])
    parser.add_argument("--out")
    args = parser.parse_args()
    device = device_of(parser, args.device)
    shapes, result = SHAPES | TINY, dict[str, Any](machine=machine(), runs=args.runs, shapes={})
    for name in args.shapes:
        for precision in DTYPES:
            found = measure(shapes[name], precision, device, args.runs)
            result["shapes"][f"{name} {precision}"] = found
            for rung, names in found.items():
                if names is not None:
                    said = f"DIFFERS in {', '.join(names)}" if names else "equal bits"
                    print(f"{name} {precision} {OURS} {rung}: {args.runs} runs, {said}")
    write_json(args.out, result)
    return any(names for found in result["shapes"].values() for names in found.values())


if __name__ == "__main__":
    sys.exit(main())
