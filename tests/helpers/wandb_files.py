"""The file of an offline Weights & Biases run, by its format."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_wandb(path: Path) -> Iterator[Any]:
    """The records of an offline run: a header of 7 bytes, then protobuf messages in blocks of 32 KiB.

    Each piece has a header: checksum (4 bytes), length (2), kind (1 whole, 2 first, 3 middle, 4 last).
    """
    from wandb.proto import wandb_internal_pb2

    data, at, message = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            message = b""
            yield record


def history_of(records: list[Any]) -> list[dict[str, str]]:
    return [
        {"/".join([i.key, *i.nested_key]).strip("/"): i.value_json for i in r.history.item}
        for r in records
        if r.HasField("history")
    ]
