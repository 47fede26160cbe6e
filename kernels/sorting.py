"""The stable order of small integer keys on a device: counted in chunks, prefix sums, placed. No atomics.

A radix sort from the lowest digit: each pass counts a chunk's digits, sums the counts over chunks and digits,
and places every key behind those of its digit that came before. The host needs only the number of keys.

Shapes: M keys, X values that a key may have, C chunks, B bins (values of a digit).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .specimen import Specimen
from .tiles import Arch, arch_of

MOST_BINS = 512
_TILE = 32  # bins or keys that a chunk is compared with at once


def stable_order(keys_M: Tensor, num_keys: int, limit: Tensor | None = None, bins: int = 256) -> Tensor:
    """The stable argsort, int64 [M], of int64 keys from 0 to ``num_keys``, which stands for no value.

    Keys from position ``limit`` on (int64 [1], on the device) count as ``num_keys``: they come last. A digit
    has ``bins`` values, a power of two from 32 to ``MOST_BINS``: kernels are compiled for it, so it follows
    from no token count.
    """
    bits = bins.bit_length() - 1
    order_M = None
    for shift in range(0, max(num_keys.bit_length(), 1), bits):
        order_M = _sort_pass(keys_M, order_M, limit, num_keys, shift, bins)
    assert order_M is not None
    return order_M


def ends(keys: Tensor, order_M: Tensor, num_keys: int) -> Tensor:
    """How many keys are at most x, int64 [X], of the keys that ``order_M`` names in ascending order.

    An order below 0 names no key, and comes last.
    """
    ends_X = torch.empty(num_keys, dtype=torch.int64, device=keys.device)
    if num_keys:
        size = order_M.shape[0]
        grid = (triton.cdiv(num_keys, 128),)
        ends_kernel[grid](keys, order_M, ends_X, size, num_keys, size.bit_length(), BLOCK=128, num_warps=4)
    return ends_X


def _sort_pass(
    keys_M: Tensor, order_M: Tensor | None, limit: Tensor | None, num_keys: int, shift: int, bins: int
) -> Tensor:
    size = keys_M.shape[0]
    new_M = torch.empty_like(keys_M)
    if size == 0:
        return new_M
    chunk, rows = _steps(arch_of(keys_M.device))
    chunks = triton.cdiv(size, chunk)
    counts_CB = torch.empty(chunks, bins, dtype=torch.int64, device=keys_M.device)
    totals_B = counts_CB.new_empty(bins)
    read = (keys_M, order_M, limit)
    flags = {
        "TILE": _TILE,
        "ORDERED": order_M is not None,
        "LIMITED": limit is not None,
        "BINS": bins,
        "CHUNK": chunk,
    }
    histogram_kernel[(chunks,)](*read, counts_CB, size, num_keys, shift, **flags, num_warps=4)
    prefix_kernel[(bins // _TILE,)](counts_CB, totals_B, chunks, BINS=bins, TILE=_TILE, ROWS=rows,
                                    num_warps=4)  # fmt: skip
    starts_kernel[(1,)](totals_B, BINS=bins, num_warps=4)
    place_kernel[(chunks,)](*read, counts_CB, totals_B, new_M, size, num_keys, shift, **flags, num_warps=4)
    return new_M


def _steps(arch: Arch) -> tuple[int, int]:
    """Keys of a chunk, chunks of a step of the prefix sum; few in the interpreter, for small tests."""
    return (16, 4) if arch.interpreted else (128, 32)


@triton.jit
def _read(keys, order, limit, at, size, num_keys, shift, ORDERED: tl.constexpr, LIMITED: tl.constexpr,
          BINS: tl.constexpr):  # fmt: skip
    """(place in keys, digit) of positions ``at``; the digit is -1 behind the last."""
    inside = at < size
    place = at
    if ORDERED:
        place = tl.load(order + at, mask=inside, other=0)
    key = tl.load(keys + place, mask=inside, other=0)
    if LIMITED:
        key = tl.where(place < tl.load(limit), key, num_keys)
    return place, tl.where(inside, (key >> shift) & (BINS - 1), -1)


@triton.jit(do_not_specialize=["size", "num_keys", "shift"])
def histogram_kernel(keys, order, limit, counts, size, num_keys, shift, ORDERED: tl.constexpr,
                     LIMITED: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
                     TILE: tl.constexpr):  # fmt: skip
    """counts[c, b] of chunk c = the program."""
    chunk = tl.program_id(0).to(tl.int64)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    _, digit = _read(keys, order, limit, at, size, num_keys, shift, ORDERED, LIMITED, BINS)
    for first in range(0, BINS, TILE):
        bins = first + tl.arange(0, TILE)
        found = tl.sum((digit[:, None] == bins[None, :]).to(tl.int32), axis=0)
        tl.store(counts + chunk * BINS + bins, found.to(tl.int64))


@triton.jit(do_not_specialize=["chunks"])
def prefix_kernel(counts, totals, chunks, BINS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):
    """Replace each bin's counts by the sum over the chunks before, and write its total."""
    bins = tl.program_id(0) * TILE + tl.arange(0, TILE)
    sums = tl.zeros([TILE], tl.int64)
    for first in range(0, chunks, ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        where = counts + rows[:, None] * BINS + bins[None, :]
        found = tl.load(where, mask=rows[:, None] < chunks, other=0)
        tl.store(where, tl.cumsum(found, axis=0) - found + sums[None, :], mask=rows[:, None] < chunks)
        sums += tl.sum(found, axis=0)
    tl.store(totals + bins, sums)


@triton.jit
def starts_kernel(totals, BINS: tl.constexpr):
    """Replace each bin's total by the sum over the bins before."""
    bins = tl.arange(0, BINS)
    found = tl.load(totals + bins)
    tl.store(totals + bins, tl.cumsum(found, axis=0) - found)


@triton.jit(do_not_specialize=["size", "num_keys", "shift"])
def place_kernel(keys, order, limit, counts, starts, new, size, num_keys, shift, ORDERED: tl.constexpr,
                 LIMITED: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
                 TILE: tl.constexpr):  # fmt: skip
    """new[position] = place, where a position is that of the digit's first key plus those before this one."""
    chunk = tl.program_id(0).to(tl.int64)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    place, digit = _read(keys, order, limit, at, size, num_keys, shift, ORDERED, LIMITED, BINS)
    before = tl.zeros([CHUNK], tl.int32)
    for first in range(0, CHUNK, TILE):
        other_at = chunk * CHUNK + first + tl.arange(0, TILE)
        _, other = _read(keys, order, limit, other_at, size, num_keys, shift, ORDERED, LIMITED, BINS)
        earlier = (other[None, :] == digit[:, None]) & (other_at[None, :] < at[:, None])
        before += tl.sum(earlier.to(tl.int32), axis=1)
    inside = at < size
    position = tl.load(starts + digit, mask=inside, other=0)
    position += tl.load(counts + chunk * BINS + digit, mask=inside, other=0) + before
    tl.store(new + position, place, mask=inside)


@triton.jit(do_not_specialize=["size", "num_keys", "steps"])
def ends_kernel(keys, order, ends, size, num_keys, steps, BLOCK: tl.constexpr):
    """ends[x] by bisection: the first position whose key is above x."""
    x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int64)
    high = low + size
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        place = tl.load(order + middle, mask=open_, other=0)
        key = tl.load(keys + place, mask=open_ & (place >= 0), other=0)
        above = (place < 0) | (key > x)
        high = tl.where(open_ & above, middle, high)
        low = tl.where(open_ & (above == 0), middle + 1, low)
    tl.store(ends + x, low, mask=x < num_keys)


def specimens(arch: Arch) -> list[Specimen]:
    """The kernels as they sort tokens (a pass behind the first) and up to 511 experts."""
    (chunk, rows), found = _steps(arch), []
    for bins, ordered in ((256, True), (MOST_BINS, False)):
        pointers = {"keys": "*i64", "counts": "*i64"}
        flags: dict[str, object] = {"ORDERED": ordered, "LIMITED": ordered, "BINS": bins, "CHUNK": chunk}
        for name in ("order", "limit"):
            pointers |= {name: "*i64"} if ordered else {}
            flags |= {} if ordered else {name: None}
        sizes = {"size": "i32", "num_keys": "i32", "shift": "i32"}
        tile = {"TILE": _TILE}
        counts = {"counts": "*i64", "totals": "*i64"}
        to = {"starts": "*i64", "new": "*i64"}
        parts: list[tuple[Any, dict[str, str], Mapping[str, object]]] = [
            (histogram_kernel, pointers | sizes, flags | tile),
            (prefix_kernel, counts | {"chunks": "i32"}, {"BINS": bins, "ROWS": rows, **tile}),
            (starts_kernel, {"totals": "*i64"}, {"BINS": bins}),
            (place_kernel, pointers | to | sizes, flags | tile),
        ]
        found += [
            Specimen(f"{kernel.__name__} {bins} bins", kernel, signature, constants, 4, 1, False)
            for kernel, signature, constants in parts
        ]
    signature = dict.fromkeys(("keys", "order", "ends"), "*i64")
    signature |= dict.fromkeys(("size", "num_keys", "steps"), "i32")
    return [*found, Specimen("ends", ends_kernel, signature, {"BLOCK": 128}, 4, 1, False)]
