"""MoE layers side by side: forward plus backward, and the bytes kept for backward.

    python benchmarks/layer.py [--shapes A B C] [--dtypes fp32 bf16] [--repetitions 30] [--out FILE]

Every repetition draws a new input, so new expert loads, as training does; all layers see the same one. All
layers are timed in one interleaved pass. bf16 is autocast over fp32 weights. The balance loss is left out.
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from typing import Any

import torch
from peers import LAYERS, SHAPES, Shape, saved_bytes
from timing import interleaved, machine, medians, ratio, write_json
from torch import Tensor, nn


def build(shape: Shape) -> tuple[dict[str, nn.Module], dict[str, str]]:
    layers, skipped = {}, {}
    for name, builder in LAYERS.items():
        try:
            torch.manual_seed(0)
            layers[name] = builder(shape)
        except ImportError as error:
            skipped[name] = str(error)
    return layers, skipped


def measure(shape: Shape, bf16: bool, repetitions: int) -> dict[str, Any]:
    layers, skipped = build(shape)
    torch.manual_seed(1)
    inputs = [torch.randn(2, shape.tokens // 2, shape.d_model) for _ in range(repetitions + 1)]
    grad = torch.randn(2, shape.tokens // 2, shape.d_model)

    def forward(name: str, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return layers[name](x)

    def step(name: str, repetition: int) -> None:
        layers[name].zero_grad(set_to_none=True)
        x = inputs[repetition].clone().requires_grad_()
        y = forward(name, x)
        y.backward(grad.to(y.dtype))

    times = interleaved({name: partial(step, name) for name in layers}, repetitions)
    middle = medians(times)
    x = inputs[0].clone().requires_grad_()
    return {
        "skipped": skipped,
        "layers": {
            name: {
                "ms": 1e3 * middle[name],
                "percent_of_dense": 100 * ratio(times, "dense SwiGLU", name),
                "speedup_of_ours": ratio(times, name, "moetrain"),
                "saved_bytes_per_token": saved_bytes(partial(forward, name, x), layers[name]) // shape.tokens,
            }
            for name in layers
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"machine": machine(), "repetitions": args.repetitions, "shapes": {}}
    print(result["machine"])
    for name in args.shapes:
        for dtype in args.dtypes:
            figures = measure(SHAPES[name], dtype == "bf16", args.repetitions)
            result["shapes"][f"{name} {dtype}"] = figures
            print(f"\n{name} {dtype}: {SHAPES[name]}")
            for layer, reason in figures["skipped"].items():
                print(f"  skipped: {layer} ({reason})")
            for layer, f in figures["layers"].items():
                print(
                    f"  {layer:24} {f['ms']:8.1f} ms  {f['percent_of_dense']:5.0f} % of dense  "
                    f"ours is {f['speedup_of_ours']:.2f}x  {f['saved_bytes_per_token']:7,} bytes/token"
                )
            write_json(args.out, result)


if __name__ == "__main__":
    main()
