"""Mutations of GGUF headers, which are parsed and written here, so that all else stays right.

Source: the specification of GGUF in ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from random import Random
from typing import Any

from fuzz.raw import mutate_bytes

_PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass
class Header:
    version: int
    pairs: list[tuple[bytes, int, Any]] = field(
        default_factory=list
    )  # key, type, value; an array: (type, list)
    tensors: list[tuple[bytes, list[int], int, int]] = field(default_factory=list)  # name, dims, type, offset


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> bytes:
        size = self.number("Q")
        self.at += size
        return self.data[self.at - size : self.at]

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner = self.number("I")
            return inner, [self.value(inner) for _ in range(self.number("Q"))]
        return self.number(_PLAIN[kind])


def parse(data: bytes) -> tuple[Header, int]:
    """The header of a valid file, and where it ends."""
    reader = _Reader(data)
    reader.at = 4
    header = Header(reader.number("I"))
    tensors, pairs = reader.number("Q"), reader.number("Q")
    for _ in range(pairs):
        key, kind = reader.text(), reader.number("I")
        header.pairs.append((key, kind, reader.value(kind)))
    for _ in range(tensors):
        name = reader.text()
        dims = [reader.number("Q") for _ in range(reader.number("I"))]
        header.tensors.append((name, dims, reader.number("I"), reader.number("Q")))
    return header, reader.at


def write(header: Header, body: bytes, alignment: int = 32) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", header.version, len(header.tensors), len(header.pairs))]
    for key, kind, value in header.pairs:
        parts += [_text(key), struct.pack("<I", kind % 2**32), _value(kind, value)]
    for name, dims, kind, offset in header.tensors:
        parts += [_text(name), struct.pack("<I", len(dims)), *(struct.pack("<Q", d % 2**64) for d in dims)]
        parts.append(struct.pack("<IQ", kind % 2**32, offset % 2**64))
    head = b"".join(parts)
    return head + b"\0" * (-len(head) % alignment) + body


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _value(kind: int, value: Any) -> bytes:
    if isinstance(value, bytes):
        return _text(value)
    if isinstance(value, tuple):
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(_value(inner, item) for item in items)
    code = _PLAIN.get(kind, "I")
    if code in "fd":
        return struct.pack(f"<{code}", value)
    size = struct.calcsize(code)
    return (int(value) % 2 ** (8 * size)).to_bytes(size, "little")


def gguf_file(rng: Random, data: bytes) -> tuple[bytes, str]:
    header, end = parse(data)
    if rng.random() < 0.4:
        return mutate_bytes(rng, data, end)
    body = data[end + (-end % 32) :]
    note = rng.choice((_pair, _pair, _pair, _tensor))(rng, header)
    return write(header, body), note


def _pair(rng: Random, header: Header) -> str:
    at = rng.randrange(len(header.pairs))
    key, kind, value = header.pairs[at]
    name = key.decode()
    edit = rng.choice(("value", "value", "value", "type", "remove", "again", "rename", "new"))
    if edit == "remove":
        del header.pairs[at]
    elif edit == "again":
        header.pairs.insert(rng.randrange(len(header.pairs)), (key, kind, _other(rng, kind, value)))
    elif edit == "rename":
        new = rng.choice(
            (key + b"x", key[:-1], b"", b"\xff", b"llama.rope.scaling.factor", rng.choice(header.pairs)[0])
        )
        header.pairs[at] = (new, kind, value)
        return f"{name} is called {new!r}"
    elif edit == "new":
        new = rng.choice(_NEW)
        header.pairs.append(new)
        return f"one more key: {new!r}"
    elif edit == "type":
        new_kind = rng.choice((*_PLAIN, _STRING, 13, 2**31))
        new_value = {_STRING: b"7"}.get(new_kind, 7)
        header.pairs[at] = (key, new_kind, new_value)
        return f"{name}: type {new_kind}"
    else:
        header.pairs[at] = (key, kind, _other(rng, kind, value))
        return f"{name} = {str(header.pairs[at][2])[:60]}"
    return f"{edit} {name}"


_NEW: list[tuple[bytes, int, Any]] = [
    (b"llama.rope.scaling.type", _STRING, b"linear"), (b"llama.rope.scaling.factor", 6, 4.0),
    (b"llama.rope.scale_linear", 6, 4.0), (b"llama.attention.sliding_window", 4, 8), (b"llama.expert_count",
    4, 8),
    (b"llama.unknown", 4, 1), (b"general.alignment", 4, 0), (b"general.alignment", 4, 3),
    (b"general.alignment", 8, b"x"),
    (b"tokenizer.ggml.add_bos_token", 7, True), (b"llama.attention.clamp_kqv", 6, 8.0),
    (b"llama.attention.causal", 7, False),
    (b"llama.attention.value_length", 4, 7), (b"llama.logit_scale", 6, 2.0), (b"split.count", 2, 2),
]  # fmt: skip


def _other(rng: Random, kind: int, value: Any) -> Any:
    if kind == _STRING:
        return rng.choice(
            (b"", b"\xff\xfe", b"x" * 5000, b"\x1b[2J", value + b"x", value[:-1], b"llama", b"linear", b"\0")
        )
    if kind == _ARRAY:
        inner, items = value
        at = rng.randrange(len(items)) if items else 0
        edited = list(items)
        edit = rng.choice(("shorter", "longer", "swap", "item", "empty", "inner"))
        if edit == "shorter":
            edited = edited[:-1]
        elif edit == "longer":
            edited += edited[-1:]
        elif edit == "swap" and items:
            edited[at], edited[-1] = edited[-1], edited[at]
        elif edit == "item" and items:
            edited[at] = _other(rng, inner, edited[at])
        elif edit == "inner":
            return 5, [1] * len(items)
        else:
            edited = []
        return inner, edited
    if kind in (6, 12):
        return rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e30, value * 2, 1e-30))
    return rng.choice((0, 1, -1, 2, 3, 2**16, 2**31 - 1, 2**32 - 1, 2**63, value + 1, value - 1, value * 2))


def _tensor(rng: Random, header: Header) -> str:
    at = rng.randrange(len(header.tensors))
    name, dims, kind, offset = header.tensors[at]
    edit = rng.choice(("dims", "type", "offset", "name", "remove", "again", "number"))
    dims = list(dims)
    if edit == "dims":
        dims[rng.randrange(len(dims))] = rng.choice(
            (0, 1, 2**31, 2**32, 2**63, 2**64 - 1, dims[0] + 1, dims[-1] * 2)
        )
    elif edit == "number":
        dims = rng.choice(([], dims[::-1], [*dims, 1], [1] * 5, [2**16] * 4, [2**32, 2**32]))
    elif edit == "type":
        kind = rng.choice((0, 1, 2, 8, 14, 24, 28, 30, 99, 2**31))
    elif edit == "offset":
        offset = rng.choice((0, 1, 7, offset + 32, offset + 1, 2**31, 2**63, 2**64 - 32))
    elif edit == "name":
        name = rng.choice(
            (b"", name + b"x", b"\xff", b"blk.99999999999.attn_q.weight", rng.choice(header.tensors)[0])
        )
    new = (name, dims, kind, offset)
    if edit == "remove":
        del header.tensors[at]
    elif edit == "again":
        header.tensors.append(new)
    else:
        header.tensors[at] = new
    return f"tensor {at}: {edit}: {str(new)[:80]}"
