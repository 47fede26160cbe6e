"""MoE layers side by side: forward plus backward, and the bytes kept for backward.

    python benchmarks/layer.py [--shapes A B C] [--dtypes fp32 bf16 pure_bf16] [--device cuda]
                               [--repetitions 30] [--out FILE]

Every repetition draws a new input, so new expert loads, as training does; all layers see the same one. All
layers are timed in one interleaved pass, from the call until the device has finished. On a CPU the C library
keeps freed memory and threads wait as in ``moetrain train``, for all layers alike. bf16 is autocast over fp32
weights; in pure_bf16 weights and inputs are bf16, which layers made for GPUs need. There is no balance loss.
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from typing import Any

import as_trainer  # noqa: F401  # before torch
import torch
from kept import saved_bytes
from peers import DENSE, OURS, PRECISIONS, SHAPES, TINY, Shape, build, call
from timing import device_of, interleaved, machine, medians, ratio, write_json

from moetrain.parallel.allocator import keep_freed_memory


def measure(shape: Shape, precision: str, device: str, repetitions: int) -> dict[str, Any]:
    layers, skipped = build(shape, device, precision)
    torch.manual_seed(1)
    size = (2, shape.tokens // 2, shape.d_model)
    inputs = [torch.randn(size, device=device) for _ in range(repetitions + 1)]
    grad = torch.randn(size, device=device)

    def step(name: str, repetition: int) -> None:
        layers[name].zero_grad(set_to_none=True)
        y = call(layers[name], inputs[repetition].clone().requires_grad_(), precision)
        y.backward(grad.to(y.dtype))

    times = interleaved({name: partial(step, name) for name in layers}, repetitions, device=device)
    middle = medians(times)
    x = inputs[0].clone().requires_grad_()

    def saved(name: str) -> int:
        return saved_bytes(partial(call, layers[name], x, precision), layers[name])

    return {
        "skipped": skipped,
        "layers": {
            name: {
                "ms": 1e3 * middle[name],
                "percent_of_dense": 100 * ratio(times, DENSE, name),
                "speedup_of_ours": ratio(times, name, OURS),
                "saved_bytes_per_token": saved(name) // shape.tokens,
            }
            for name in layers
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=[*SHAPES, *TINY])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=PRECISIONS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out")
    args = parser.parse_args()
    device = device_of(parser, args.device)
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    if device == "cpu":
        keep_freed_memory()
    result: dict[str, Any] = {"machine": machine(), "repetitions": args.repetitions, "shapes": {}}
    print(result["machine"])
    shapes = SHAPES | TINY
    for name in args.shapes:
        for dtype in args.dtypes:
            figures = measure(shapes[name], dtype, device, args.repetitions)
            result["shapes"][f"{name} {dtype}"] = figures
            print(f"\n{name} {dtype}: {shapes[name]}")
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
