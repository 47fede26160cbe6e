"""Bytes that an MoE layer keeps for the backward pass, part by part, against a bound and against others.

    python benchmarks/memory.py [--shapes A B C] [--precisions fp32 pure_bf16] [--device cuda] [--out FILE]

Every rung of experts.backend that this device has, and every peer of ``peers.py``. A storage counts once;
parameters do not count. Inputs are random and routers are as initialised, so loads are even up to chance. The
bound (``kept.py``) is 2 w R F + w T D bytes for products of w bytes an element (in bf16: 4 R F + 2 T D), and
indices, weights and scores, with R = N + E (block - 1). In pure_bf16 the layer's input is bf16 too, as a bf16
residual stream's is; of a wider input autocast keeps both the router's and the experts' copy.

Exits with 1 where a rung of ours keeps more than the bound, or a peer less. The loop is the oracle: autograd
keeps what it likes for it, so nothing is asked of it. ``hidden`` is what the device allocated in the forward
pass and neither autograd's hooks nor the output account for (CUDA only).

Shapes: T tokens, D model, F hidden, E experts, k experts a token, N = T k.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kept import PARTS, Layer, kept_storages
from peers import DENSE, OURS, SHAPES, TINY, Shape, build, call, moe_layer
from timing import device_of, finish, machine, write_json
from torch import Tensor, nn

from moetrain.ops.experts.blocks import usual_block
from moetrain.ops.experts.case import Case
from moetrain.ops.experts.table import BACKENDS, LOOP, why_not

DTYPES = {"fp32": torch.float32, "pure_bf16": torch.bfloat16}


def rungs(shape: Shape, device: str, dtype: torch.dtype, block: int) -> dict[str, str | None]:
    """Of each backend, why this device does not have it; None where it does."""
    case = Case(torch.device(device), dtype, shape.d_model, shape.d_ff, "swiglu", block)
    return {name: why_not(name, case) for name in (*BACKENDS, LOOP)}


def hidden_bytes(run: Callable[[], Tensor], device: str, seen: int) -> int | None:
    """Bytes allocated by ``run`` and still held at its end, less the output and the ``seen`` ones."""
    if device == "cpu":
        return None
    finish(device)
    before = torch.cuda.memory_allocated(device)
    out = run()
    finish(device)
    return torch.cuda.memory_allocated(device) - before - out.untyped_storage().nbytes() - seen


def measure(layer: nn.Module, sizes: Layer, x: Tensor, precision: str) -> dict[str, Any]:
    run = partial(call, layer, x, precision)
    parts = sizes.parts(kept_storages(run, layer))
    made = sum(parts.values()) - x.untyped_storage().nbytes()  # the input was there before
    hidden = hidden_bytes(run, x.device.type, made)
    return {"bytes": sum(parts.values()), "parts": parts, "hidden": hidden}


def compare(shape: Shape, precision: str, device: str) -> dict[str, Any]:
    """Figures of each of our rungs and of each peer, and why others are missing."""
    dtype = DTYPES[precision]
    layers, skipped = build(shape, device, precision)
    x = torch.randn(2, shape.tokens // 2, shape.d_model, generator=torch.Generator().manual_seed(1))
    x = x.to(device, dtype).requires_grad_()
    block = usual_block(x.device, dtype, shape.tokens * shape.top_k, shape.experts)
    sizes = Layer(shape.tokens, shape.d_model, shape.d_ff, shape.experts, shape.top_k, block, dtype)
    ours, found = layers.pop(OURS), {}
    for name, reason in rungs(shape, device, dtype, block).items():
        if reason is not None:
            skipped[f"{OURS} {name}"] = reason
            continue
        moe_layer(ours).use_backend(name)
        found[f"{OURS} {name}"] = measure(ours, sizes, x, precision)
    for name, layer in layers.items():
        found[name] = measure(layer, sizes, x, precision)
    return {"block": block, "bound": sizes.bound(), "layers": found, "skipped": skipped}


def faults(figures: dict[str, Any]) -> list[str]:
    """Rungs of ours above the bound, and peers below."""
    most, lines = sum(figures["bound"].values()), []
    for name, found in figures["layers"].items():
        mine = name.startswith(f"{OURS} ")
        if mine and name != f"{OURS} {LOOP}" and found["bytes"] > most:
            lines.append(f"{name} keeps {found['bytes']:,} bytes, its bound is {most:,}")
        if not mine and name != DENSE and found["bytes"] < most:
            lines.append(f"{name} keeps {found['bytes']:,} bytes, less than our bound of {most:,}")
    return lines


def table(figures: dict[str, Any], tokens: int) -> list[str]:
    """A Markdown table: bytes a token of each part, together, and over the bound."""
    bound = figures["bound"]
    others = [n for f in figures["layers"].values() for n, size in f["parts"].items() if size]
    names = [*PARTS, *dict.fromkeys(n for n in others if n not in PARTS)]
    lines = [
        f"| bytes a token | {' | '.join(names)} | together | of the bound | hidden |",
        f"|---|{'---:|' * (len(names) + 3)}",
    ]
    rows = {"bound": {"parts": bound, "bytes": sum(bound.values()), "hidden": None}, **figures["layers"]}
    for name, found in rows.items():
        cells = [f"{found['parts'].get(part, 0) / tokens:,.1f}" for part in names]
        ratio = found["bytes"] / sum(bound.values())
        hidden = "" if found["hidden"] is None else f"{found['hidden'] / tokens:,.1f}"
        together = f"{found['bytes'] / tokens:,.1f} | {ratio:.3f} | {hidden} |"
        lines.append(f"| {name} | {' | '.join(cells)} | {together}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=[*SHAPES, *TINY])
    parser.add_argument("--precisions", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out")
    args = parser.parse_args()
    device = device_of(parser, args.device)
    logging.disable(logging.WARNING)
    result: dict[str, Any] = {"machine": machine(), "device": device, "shapes": {}}
    found = []
    shapes = SHAPES | TINY
    for name in args.shapes:
        for precision in args.precisions:
            figures = compare(shapes[name], precision, device)
            result["shapes"][f"{name} {precision}"] = figures
            print(f"\n{name} {precision}: {shapes[name]}, blocks of {figures['block']} rows")
            print("\n".join(table(figures, shapes[name].tokens)))
            for layer, reason in figures["skipped"].items():
                print(f"skipped: {layer} ({reason})")
            found += [f"{name} {precision}: {line}" for line in faults(figures)]
    result["faults"] = found
    print("\n".join(["", *found, f"{len(found)} outside their bounds"]))
    write_json(args.out, result)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
