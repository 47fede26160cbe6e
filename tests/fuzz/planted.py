"""Targets with a known fault each, by which the tests of the harness see that it finds them."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

from fuzz.forms import any_bytes, json_file, jsonl_file, safetensors_file, yaml_file
from fuzz.gguf_form import gguf_file, parse, write
from fuzz.target import Target, Way, anything, same
from fuzz.trees import SECRET
from moetrain.errors import UserError


def make_small_world(folder: Path) -> None:
    """The valid files of the planted targets."""
    folder.mkdir(parents=True)
    document = {"count": 3, "names": ["a", "b"], "inner": {"rate": 0.5}}
    (folder / "a.json").write_text(json.dumps(document))
    (folder / "a.yaml").write_text(yaml.safe_dump(document))
    (folder / "a.jsonl").write_text("".join(json.dumps({"step": n, "loss": 1.5}) + "\n" for n in range(4)))
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    (folder / "a.bin").write_bytes(bytes(range(64)))
    (folder / "a.gguf").write_bytes(_small_gguf())


def _small_gguf() -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<II", 4, 7)
    head += struct.pack("<Q", 1) + b"w" + struct.pack("<IQIQ", 1, 2, 0, 0)
    header, _ = parse(head)
    return write(header, bytes(32))


def _untouched() -> bool:
    return json.loads(Path("a.json").read_bytes()) == {
        "count": 3,
        "names": ["a", "b"],
        "inner": {"rate": 0.5},
    }


def _endless() -> None:
    while True:
        pass


def _swallowing() -> None:
    """Catches whatever ends it, once."""
    try:
        _endless()
    except BaseException:
        return


def _told_secret() -> None:
    raise UserError(f"no number: {os.environ['FUZZ_SECRET']}")


FAULTS: dict[str, Callable[[], Any]] = {  # by outcome
    "other": lambda: {}["key"],
    "hang": _endless,
    "hang swallowed": _swallowing,
    "hang waiting": lambda: time.sleep(60),
    "hang native": lambda: sum(range(10**12)),
    "memory": lambda: len(bytearray(300_000_000)),
    "memory refused": lambda: bytearray(2**60),
    "crash": lambda: ctypes.string_at(0),
    "leak": _told_secret,
    "leak taken": lambda: {"value": SECRET},
    "differs": lambda: 1,
}


def _numbers(document: Any) -> None:
    assert document["count"] + len(document["names"]) > document["inner"]["rate"]


def _json() -> None:
    _numbers(json.loads(Path("a.json").read_bytes()))


def _yaml() -> None:
    _numbers(yaml.safe_load(Path("a.yaml").read_bytes()))


def _jsonl() -> float:
    return sum(json.loads(line)["loss"] for line in Path("a.jsonl").read_bytes().splitlines())


def _safetensors() -> Any:
    data = Path("a.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    begin, end = json.loads(data[8 : 8 + size])["w"]["data_offsets"]
    return struct.unpack("<2f", data[8 + size :][begin:end])


def _bytes() -> int:
    return Path("a.bin").read_bytes().index(17)


def _gguf() -> Any:
    header, _ = parse(Path("a.gguf").read_bytes())
    return header.pairs[0][2] + header.tensors[0][1][0]


def _fault(name: str, fault: Callable[[], Any]) -> Target:
    def load() -> Any:
        return 0 if _untouched() else fault()

    def form(rng: Random, data: bytes) -> tuple[bytes, str]:
        return b"{}", "emptied"

    judge = same if name == "differs" else anything
    return Target(name, ("a.json",), ("a.json",), form, (Way("load", load, judge),))


NAIVE = {  # loaders that check nothing, one for each form
    "json": ("a.json", json_file, _json),
    "yaml": ("a.yaml", yaml_file, _yaml),
    "jsonl": ("a.jsonl", jsonl_file, _jsonl),
    "safetensors": ("a.safetensors", safetensors_file, _safetensors),
    "bytes": ("a.bin", any_bytes, _bytes),
    "gguf": ("a.gguf", gguf_file, _gguf),
}
PLANTED = {name.replace(" ", "_"): _fault(name.split()[0], fault) for name, fault in FAULTS.items()}
PLANTED |= {
    f"naive_{name}": Target(f"naive_{name}", (file,), (file,), form, (Way("load", load, same),))
    for name, (file, form, load) in NAIVE.items()
}
