"""Targets: the files of a checkpoint, with hashes that no longer fit and with hashes made right again."""

from __future__ import annotations

import copy
import functools
import json
import math
from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzz.forms import any_bytes, blocks_file, json_file
from fuzz.sign import signed_checkpoint, signed_manifest
from fuzz.target import Target, Way, anything, same
from fuzz.world import STEPS
from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.read import CHECKPOINTS, load_checkpoint, step_folder
from moetrain.checkpoint.state_dict import rng_state
from moetrain.checkpoint.stream import StoredTensors
from moetrain.config.hydra.compose import load_yaml
from moetrain.train.start import build
from moetrain.train.state import TrainState

_WHOLE, _SPLIT = f"run/{CHECKPOINTS}/step_*", "split"
EXTRA_FILE = f"{_WHOLE}/extra.json"
_COUNT = 2**62  # what a run can count up to
Tensors = dict[str, tuple[str, bytes]]


@functools.cache
def _live() -> tuple[TrainState, dict[str, torch.Tensor]]:
    """The objects that a run loads its state into, and their tensors as they were first."""
    cfg = load_yaml("run/config.yaml")
    state = build(cfg, "cpu").state
    return state, {name: tensor.clone() for name, tensor in state.tensors().items()}


def resumed() -> tuple[TrainState, Path]:
    """A run's state after it took over the checkpoint of the world, and the checkpoint."""
    state, first = _live()
    with torch.no_grad():
        for name, tensor in state.tensors().items():
            tensor.copy_(first[name])
    path = step_folder(Path("run") / CHECKPOINTS, STEPS)
    state.load(Checkpointer(Path("run") / CHECKPOINTS), path)
    return state, path


def _resume() -> dict[str, Any]:
    """What ``moetrain train`` does with a checkpoint that it goes on from, up to the first step."""
    state, path = resumed()
    found = {
        "step": state.step,
        "tokens": state.tokens,
        "skipped": list(state.skipped),
        "loader": state.loader.state_dict(),
        "monitor": state.monitor.state_dict(),
        "meter": state.meter.state_dict(),
        "rng": rng_state(),
        "document": json.loads((path / "extra.json").read_bytes()),
    }
    found = copy.deepcopy(found)  # before the objects are used
    state.start(0)
    state.loader.build(state.loader.samples)
    state.monitor.check(1.0)
    found["left out"] = state.step in state.skipped
    state.meter.step(64)
    return found | {"tensors": _bytes_of(state.tensors())}


def _stored(path: str) -> dict[str, Any]:
    """Every tensor by the way of export and eval, and the extra."""
    stored = StoredTensors(Path(path))
    tensors = {name: stored.read(name) for name in stored.tensors}
    extra = load_checkpoint(Path(path), {name: torch.empty_like(t) for name, t in tensors.items()})
    return {"tensors": _bytes_of(tensors), "extra": extra}


def _bytes_of(tensors: dict[str, torch.Tensor]) -> Tensors:
    return {
        name: (
            f"{t.dtype}{list(t.shape)}",
            t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, t in tensors.items()
    }


def _stored_values(good: Any, found: Any) -> str | None:
    """Each tensor is one that was stored: which of two of a shape is which, nothing in the file can tell."""
    values = {value for _, value in good["tensors"].values()}
    wrong = [name for name, (_, value) in found["tensors"].items() if value not in values]
    return f"differs: {wrong[0]} is none of the stored tensors" if wrong else None


def _stored_rows(good: Any, found: Any) -> str | None:
    """As :func:`_stored_values`, for blocks of rows."""
    halves = set()
    for kind, value in good["tensors"].values():
        rows = int(kind.partition("[")[2].split(",")[0].strip("]") or 1)
        size = len(value) // rows
        halves |= {value, value[: rows // 2 * size], value[rows // 2 * size :]}
    for name, (kind, value) in found["tensors"].items():
        rows = int(kind.partition("[")[2].split(",")[0].strip("]") or 1)
        half = rows // 2 * (len(value) // rows) if rows else 0
        if value not in halves and not {value[:half], value[half:]} <= halves:
            return f"differs: {name} is made of other blocks than were stored"
    return None


def _fits_extra(good: Any, found: Any) -> str | None:
    """The state is the document's, whose every value has its type and lies in its range."""
    document = found["document"]
    wrong = [
        key
        for key in ("step", "tokens", "skipped", "loader", "monitor", "meter", "rng")
        if not _fits(key, document)
    ]
    if wrong:
        return f"differs: {wrong[0]} = {str(document.get(wrong[0]))[:60]} was taken"
    if document["step"] != good["step"]:
        return f"differs: step {document['step']} of a checkpoint of step {good['step']}"
    for key in ("tokens", "skipped", "loader", "monitor", "meter", "rng"):
        known = _common(document[key], found[key])
        if repr(found[key]).lower() != repr(known).lower():  # random states are hexadecimal digits
            return f"differs: {key} is {str(found[key])[:60]}, not the document's"
    return _stored_values(good, found)


def _common(document: Any, found: Any) -> Any:
    """The document without keys that were not asked for: a later version may write more."""
    if isinstance(document, dict) and isinstance(found, dict):
        return {key: _common(document[key], found[key]) for key in found if key in document}
    return document


def _fits(key: str, document: Any) -> bool:
    def count(value: Any) -> bool:
        return type(value) is int and 0 <= value < _COUNT

    def number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    value = document.get(key) if isinstance(document, dict) else None
    if key in ("step", "tokens"):
        return count(value)
    if key == "skipped":
        return isinstance(value, list) and all(map(count, value))
    if not isinstance(value, dict):
        return False
    if key == "loader":
        return (
            count(value.get("samples"))
            and count(value.get("seed"))
            and isinstance(value.get("fingerprint"), str)
        )
    if key == "monitor":
        return number(value.get("sum")) and count(value.get("count"))
    return key != "meter" or (number(value.get("seconds")) and value["seconds"] >= 0)


def resign(path: Path, rng: Random) -> str:
    if path.name == "manifest.json":
        path.write_bytes(signed_manifest(path.read_bytes()))
    else:
        signed_checkpoint(path.parent)
    return " (signed again)"


_RESUME, _READ = Way("resume", _resume, same), Way("export", lambda: _stored("run"), same)
TARGETS = [
    Target(
        "checkpoint_raw",
        ("run", "cache", "text"),
        (f"{_WHOLE}/*.json", f"{_WHOLE}/*.distcp"),
        any_bytes,
        (_RESUME, _READ),
    ),
    Target("checkpoint_manifest", ("run",), (f"{_WHOLE}/manifest.json",), json_file, (_READ,), resign),
    Target(
        "checkpoint_metadata",
        ("run", "split", "cache", "text"),
        (f"{_WHOLE}/metadata.json",),
        blocks_file,
        (Way("resume", _resume, _stored_values), Way("export", lambda: _stored("run"), _stored_values)),
        resign,
    ),
    Target(
        "checkpoint_split",
        ("split",),
        ("split/metadata.json",),
        blocks_file,
        (Way("export", lambda: _stored("split"), _stored_rows),),
        resign,
    ),
    Target(
        "checkpoint_extra",
        ("run", "cache", "text"),
        (EXTRA_FILE,),
        json_file,
        (Way("resume", _resume, _fits_extra),),
        resign,
    ),
    Target(
        "checkpoint_blocks",
        ("run",),
        (f"{_WHOLE}/*.distcp",),
        any_bytes,
        (Way("export", lambda: _stored("run"), anything),),
        resign,
    ),
]
