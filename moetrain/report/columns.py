"""What a run's two files of rows hold, as arrays: read line by line, with bounds on what is kept."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.errors import UserError
from moetrain.train.log.jsonl import read_lines

Array = NDArray[np.float64]
Columns = dict[str, tuple[Array, Array]]  # key -> steps (rising, each once) and values

MAX_KEYS = 50_000  # 64 MoE layers have 450
MAX_LOADS = 1 << 24  # numbers of all rows of load.jsonl that are kept
HUGE = 1e100  # larger numbers are infinite here: nothing that is measured is, and figures have no room for it


@dataclass(frozen=True)
class Loads:
    """Expert shares over time: one array [P, E] an MoE layer, of P recorded steps and its own E experts."""

    steps: Array
    layers: tuple[int, ...]
    shares: tuple[Array, ...]

    @property
    def relative(self) -> tuple[Array, ...]:
        """Times the uniform share: 1 is perfect balance, 0 a dead expert."""
        return tuple(share_PE * share_PE.shape[1] for share_PE in self.shares)


def number(value: Any) -> float:
    """``value`` as a float; NaN for what is none (null, text, true), infinite where it is huge."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    if abs(value) > HUGE:
        return math.inf if value > 0 else -math.inf
    return float(value)


def read_columns(path: Path, notes: list[str]) -> Columns:
    """The columns of metrics.jsonl; of two rows of a step the later one counts."""
    found: dict[str, tuple[array[float], array[float]]] = {}
    broken = left_out = 0
    for row in _rows(path, notes):
        if row is None:
            broken += 1
            continue
        step = float(row.get("step", math.nan))
        for key, value in row.items():
            if key not in found and len(found) >= MAX_KEYS:
                left_out += 1
                continue
            steps, values = found.setdefault(key, (array("d"), array("d")))
            steps.append(step)
            values.append(number(value))
    _note_broken(path, broken, notes)
    if left_out:
        notes.append(f"{path.name}: {left_out} values beyond the first {MAX_KEYS} keys were left out")
    return {key: _by_step(np.array(steps), np.array(values)) for key, (steps, values) in found.items()}


def read_loads(path: Path, notes: list[str]) -> Loads | None:
    """The rows of load.jsonl that have the newest one's shape, thinned out where they are too many."""
    if not path.exists():  # a dense model has none
        return None
    found: dict[int, list[Array]] = {}
    layers: list[int] = []
    broken = size = 0
    for row in _rows(path, notes):
        shares = _shares(row) if row is not None else None
        if row is None:
            broken += 1
        elif shares is not None:
            size += _size(shares) - (_size(found[row["step"]]) if row["step"] in found else 0)
            found[row["step"]] = shares
            layers = _layers(row) or layers
        while size > MAX_LOADS:
            found = dict(list(found.items())[::-2][::-1])
            size = sum(map(_size, found.values()))
    _note_broken(path, broken, notes)
    if not found:
        return None
    sizes = [len(share_E) for share_E in found[max(found)]]  # rows of another model, if any, are left out
    steps = sorted(step for step, shares in found.items() if [len(share_E) for share_E in shares] == sizes)
    names = tuple(layers) if len(layers) == len(sizes) else tuple(range(len(sizes)))
    by_layer = zip(*(found[step] for step in steps), strict=True)
    return Loads(np.array(steps, dtype=np.float64), names, tuple(np.stack(rows) for rows in by_layer))


def _rows(path: Path, notes: list[str]) -> Iterator[dict[str, Any] | None]:
    """Each line's row, or None for one that holds none."""
    if not path.exists():
        notes.append(f"{path.name} is missing")
        return
    try:
        for line in read_lines(path):
            yield line.row
    except UserError as error:
        notes.append(f"{path.name} could not be read: {error}")


def _note_broken(path: Path, broken: int, notes: list[str]) -> None:
    if broken:
        lines = "1 unreadable line was" if broken == 1 else f"{broken} unreadable lines were"
        notes.append(f"{path.name}: {lines} skipped")


def _by_step(steps: Array, values: Array) -> tuple[Array, Array]:
    known = np.isfinite(steps)
    steps, values = steps[known], values[known]
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last = np.append(steps[1:] != steps[:-1], True)[: len(steps)]
    return steps[last], values[last]


def _shares(row: dict[str, Any]) -> list[Array] | None:
    """The shares of a row, an array a layer; None where they are none: no lists, or not between 0 and 1."""
    if "step" not in row:
        return None
    try:
        shares = [np.array(share, dtype=np.float64) for share in row["load"]]
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    if not shares or any(share_E.ndim != 1 or not share_E.size for share_E in shares):
        return None
    fitting = all(bool(((share_E >= 0) & (share_E <= 1.001)).all()) for share_E in shares)
    return shares if fitting and _size(shares) <= MAX_LOADS else None


def _size(shares: list[Array]) -> int:
    return sum(share_E.size for share_E in shares)


def _layers(row: dict[str, Any]) -> list[int]:
    layers = row.get("layers")
    whole = isinstance(layers, list) and all(type(layer) is int and 0 <= layer < 2**31 for layer in layers)
    return layers if isinstance(layers, list) and whole else []
