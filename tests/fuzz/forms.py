"""Mutations of whole files by their form: JSON, YAML, rows of JSON, safetensors, bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

import yaml

from fuzz.raw import mutate_bytes
from fuzz.trees import ODD, YAML_ODD, dump, mutate_tree, of, parse

Form = Callable[[Random, bytes], tuple[bytes, str]]


def json_file(rng: Random, data: bytes) -> tuple[bytes, str]:
    if rng.random() < 0.15:
        return mutate_bytes(rng, data)
    tree, note = mutate_tree(rng, parse(data))
    return dump(tree).encode() + b"\n", note


def yaml_file(rng: Random, data: bytes) -> tuple[bytes, str]:
    kind = rng.random()
    if kind < 0.15:
        return mutate_bytes(rng, data)
    if kind < 0.3:
        return _lines(rng, data)
    tree, note = mutate_tree(rng, of(yaml.safe_load(data)), [*ODD, *YAML_ODD, *YAML_ODD])
    return dump(tree).encode() + b"\n", note


def jsonl_file(rng: Random, data: bytes) -> tuple[bytes, str]:
    kind = rng.random()
    if kind < 0.15:
        return mutate_bytes(rng, data)
    if kind < 0.3:
        return _lines(rng, data)
    lines = data.split(b"\n")
    if kind < 0.55:
        return _column(rng, lines)
    at = rng.randrange(len(lines) - 1)
    tree, note = mutate_tree(rng, parse(lines[at]))
    lines[at] = dump(tree).encode()
    return b"\n".join(lines), f"line {at + 1}: {note}"


def safetensors_file(rng: Random, data: bytes) -> tuple[bytes, str]:
    """In the header, whose length is made right again in most cases."""
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    if rng.random() < 0.35:
        return mutate_bytes(rng, data, 8 + size)
    tree, note = mutate_tree(rng, parse(header))
    text = dump(tree).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body, note


def blocks_file(rng: Random, data: bytes) -> tuple[bytes, str]:
    """A checkpoint's metadata: half of the edits move the blocks of tensors, or say another size of them."""
    if rng.random() < 0.5:
        return json_file(rng, data)
    document = json.loads(data)
    name = rng.choice(sorted(document["tensors"]))
    entry = document["tensors"][name]
    chunks = entry["chunks"]
    chunk = rng.choice(chunks)
    key = rng.choice(("offsets", "sizes", "position", "length", "file", "shape", "all", "again"))
    others = [c for e in document["tensors"].values() for c in e["chunks"]]
    if key == "again":
        chunks.append(dict(chunk))
    elif key == "shape":
        entry["shape"] = rng.choice(
            (entry["shape"][::-1], [*entry["shape"], 1], [2 * n for n in entry["shape"]])
        )
    elif key == "all":  # another block's bytes
        chunk |= {k: rng.choice(others)[k] for k in ("file", "position", "length")}
    elif key in ("offsets", "sizes") and chunk[key]:
        at = rng.randrange(len(chunk[key]))
        by = rng.choice((1, -1, 2, chunk["sizes"][at], -(chunk["sizes"][at] // 2)))
        chunk[key][at] += by
        if len(chunks) > 1 and key == "sizes":  # another one makes up for it
            other = rng.choice([c for c in chunks if c is not chunk])
            other["sizes"][at] -= by
    else:
        chunk[key] = rng.choice(others)[key]
    return (json.dumps(document, sort_keys=True) + "\n").encode(), f"{name}: {key}: {str(chunk)[:120]}"


def any_bytes(rng: Random, data: bytes) -> tuple[bytes, str]:
    return mutate_bytes(rng, data)


def _column(rng: Random, lines: list[bytes]) -> tuple[bytes, str]:
    """An odd value of one key, in half of the cases of those that order the rows, in one row or in all."""
    rows = [parse(line) for line in lines if line]
    chosen = rng.choice((rows, [rng.choice(rows)]))
    keys = rng.choice((chosen[0], chosen[0][:3]))
    key, odd = rng.choice(keys)[0], rng.choice((*ODD, 1e300, 1e16, -1e300, 10**18, 3e-310))
    for row in chosen:
        row[:] = [(name, odd if name == key else value) for name, value in row]
    text = b"".join(dump(row).encode() + b"\n" for row in rows)
    return text, f"{key} = {dump(odd)[:40]} in {len(chosen)} rows"


def _lines(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Whole lines removed, repeated, swapped, indented or replaced."""
    lines = data.split(b"\n")
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    edit = rng.choice(("remove", "repeat", "swap", "indent", "junk", "crlf", "nul"))
    if edit == "remove":
        del lines[at]
    elif edit == "repeat":
        lines.insert(other, lines[at])
    elif edit == "swap":
        lines[at], lines[other] = lines[other], lines[at]
    elif edit == "indent":
        lines[at] = rng.choice((b"  ", b"\t", b" ")) + lines[at]
    elif edit == "junk":
        lines.insert(
            at,
            rng.choice(
                (b"{", b"[]", b"7", b"null", b"\xff\xfe", b"x" * 10**6, b"%YAML 9.9", b"--- a", b"a: *b")
            ),
        )
    elif edit == "crlf":
        return data.replace(b"\n", b"\r\n"), "lines end in CR LF"
    else:
        return data + b"\0" * 4096, "4096 NUL bytes at the end"
    return b"\n".join(lines), f"{edit} line {at + 1} (other: {other + 1})"
