"""Mutations of bytes, which know nothing of what the bytes mean."""

from __future__ import annotations

from random import Random

_ODD_COUNTS = (
    0,
    1,
    2**7,
    2**8 - 1,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def mutate_bytes(rng: Random, data: bytes, limit: int | None = None) -> tuple[bytes, str]:
    """``data`` with one edit that starts in its first ``limit`` bytes, and the edit in words."""
    end = max(1, len(data) if limit is None else min(limit, len(data)))
    at = rng.randrange(end)
    size = min(rng.choice((1, 2, 4, 8, 64, 1000)), len(data) - at)
    block = data[at : at + size]
    edit = rng.choice(
        ("bit", "bit", "byte", "cut", "remove", "insert", "repeat", "zero", "swap", "append", "count")
    )
    if edit == "bit" and data:
        bit = rng.randrange(8)
        changed = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        return changed, f"flip bit {bit} of byte {at}"
    if edit == "byte" and data:
        value = rng.choice((0, 0x0A, 0x22, 0x5B, 0x7B, 0x7F, 0x80, 0xC3, 0xED, 0xFF))
        return data[:at] + bytes([value]) + data[at + 1 :], f"byte {at} becomes {value}"
    if edit == "cut":
        return data[:at], f"cut at {at} of {len(data)}"
    if edit == "remove":
        return data[:at] + data[at + size :], f"remove {size} bytes at {at}"
    if edit == "insert":
        new = rng.choice(
            (rng.randbytes(size), b"\0" * size, b"\x1b[2J", b"\xff\xfe", b"\n", b"]" * size, b"[" * 3000)
        )
        return data[:at] + new + data[at:], f"insert {len(new)} bytes ({new[:4]!r} ...) at {at}"
    if edit == "repeat":
        times = rng.choice((1, 2, 50))
        return data[:at] + block * times + data[at:], f"repeat {size} bytes at {at} {times} times"
    if edit == "zero":
        return data[:at] + b"\0" * size + data[at + size :], f"zero {size} bytes at {at}"
    if edit == "swap":
        other = data[at + size : at + 2 * size]
        return data[:at] + other + block + data[at + 2 * size :], f"swap two blocks of {size} bytes at {at}"
    if edit == "append":
        new = rng.choice((b"\0" * 512, b"\n\n", b"{}", b"x", data[:100]))
        return data + new, f"append {len(new)} bytes ({new[:4]!r} ...)"
    width, count = rng.choice((4, 8)), rng.choice(_ODD_COUNTS)
    number = (count % 2 ** (8 * width)).to_bytes(width, "little")
    return data[:at] + number + data[at + width :], f"{width} bytes at {at} become the number {count}"
