"""A small product with faults to plant, compiled ahead of time: what the static checks must see.

    python tests/helpers/planted_kernels.py

prints one JSON row a specimen. It is a process of its own, since what is interpreted cannot be compiled.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from kernel_build import compile_for

from moetrain.kernels.specimen import Specimen, pointer
from moetrain.kernels.tiles import ARCHITECTURES


@triton.jit(do_not_specialize=["n"])
def product(
    a_ptr, b_ptr, experts_ptr, out_ptr, n, depth, stride_a, stride_b, stride_e, stride_out,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns, steps = tl.arange(0, COLUMNS), tl.arange(0, STEP)
    mask = (rows < n)[:, None]
    expert = tl.load(experts_ptr + tl.program_id(0))
    if expert < 0:
        return
    if WIDE:
        rows, expert = rows.to(tl.int64), expert.to(tl.int64)
    a = a_ptr + rows[:, None] * stride_a + steps[None, :]
    b = b_ptr + expert * stride_e + steps[:, None].to(tl.int64) * stride_b + columns[None, :]
    out = tl.zeros((ROWS, COLUMNS), tl.float32)
    offset = depth * 0
    for _ in range(0, depth, STEP):
        out = tl.dot(tl.load(a, mask=mask, other=0.0), tl.load(b + offset), out, input_precision="ieee")
        a += STEP
        b += STEP * stride_b
        if CARRY:  # a product that reaches an address in the next round only
            offset = depth * stride_b
    tl.store(
        out_ptr + rows[:, None].to(tl.int64) * stride_out + columns[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask,
    )


def specimen(name: str, dtype: torch.dtype, size: int, wide: bool = True, carry: bool = False) -> Specimen:
    tensors = {name: pointer(dtype) for name in ("a_ptr", "b_ptr", "out_ptr")}
    numbers = dict.fromkeys(("n", "depth", "stride_a", "stride_b", "stride_e", "stride_out"), "i32")
    constants = {"ROWS": size, "COLUMNS": size, "STEP": 16, "WIDE": wide, "CARRY": carry}
    signature = {**tensors, "experts_ptr": "*i32", **numbers}
    warps = 1 if size == 64 and dtype is torch.float32 else 4  # of one, a thread has too many accumulators
    return Specimen(name, product, signature, constants, warps, 2, products=True)


SPECIMENS = {
    "right": ("sm_90", specimen("right", torch.bfloat16, 64)),
    "right on AMD": ("gfx942", specimen("right on AMD", torch.float16, 32)),
    "narrow": ("sm_80", specimen("narrow", torch.bfloat16, 16, wide=False)),
    "carried": ("sm_80", specimen("carried", torch.bfloat16, 16, carry=True)),
    "no tensor cores": ("sm_80", specimen("no tensor cores", torch.float32, 16)),
    "spilled": ("sm_80", specimen("spilled", torch.float32, 64)),
}

if __name__ == "__main__":
    rows = {name: asdict(compile_for(each, ARCHITECTURES[arch])) for name, (arch, each) in SPECIMENS.items()}
    print(json.dumps(rows))
