"""The schema of `extra.json` of a run's checkpoint: types and ranges, checked before use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from moetrain.errors import UserError
from moetrain.files import parse_json

Count = Annotated[int, Field(ge=0, lt=2**62)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$", max_length=1 << 16)]
Layer = Annotated[str, Field(pattern=r"^(-1|[0-9]{1,9})$")]
_WORDS = 624  # of a Mersenne twister


@dataclass(frozen=True)
class SavedLoader:
    samples: Count
    seed: int
    fingerprint: str


@dataclass(frozen=True)
class SavedMonitor:
    sum: Finite
    count: Count


@dataclass(frozen=True)
class SavedMeter:
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class SavedPython:
    version: int
    words: Annotated[Hex, Field(min_length=8 * (_WORDS + 1), max_length=8 * (_WORDS + 1))]
    gauss: Finite | None


@dataclass(frozen=True)
class SavedNumpy:
    """The state of numpy's generator. A ``position`` beyond its words would make numpy read other memory."""

    generator: Annotated[str, Field(pattern="^MT19937$")]
    words: Annotated[Hex, Field(min_length=8 * _WORDS, max_length=8 * _WORDS)]
    position: Annotated[int, Field(ge=0, le=_WORDS)]
    has_gauss: Annotated[int, Field(ge=0, le=1)]
    gauss: Finite


@dataclass(frozen=True)
class SavedRng:
    torch: Hex
    python: SavedPython
    numpy: SavedNumpy
    cuda: Hex | None = None


@dataclass(frozen=True)
class SavedPlace:
    """Readings of an alarm in a row, and whether it is raised."""

    bad: Count
    good: Count
    raised: bool


@dataclass(frozen=True)
class SavedAlarms:
    """An alarm's places, and a layer's experts' steps without a token; layers by their places, -1 the run."""

    places: dict[str, dict[Layer, SavedPlace]]
    idle: dict[Layer, Annotated[tuple[Count, ...], Field(max_length=1 << 20)]]
    loss: SavedMonitor | None = None


@dataclass(frozen=True)
class SavedState:
    """The fields of `extra.json`. Unknown keys are ignored: a later version may write more."""

    step: Count
    tokens: Count
    skipped: tuple[Count, ...]
    loader: SavedLoader
    monitor: SavedMonitor
    meter: SavedMeter
    rng: SavedRng
    identity: dict[str, str] | None = None  # what the run computes, to be compared on resume
    alarms: SavedAlarms | None = None

    @staticmethod
    def of(extra: Mapping[str, Any], where: str) -> SavedState:
        """The state in ``extra``. Raises UserError, from ``where`` on, for values that no run can save."""
        saved = parse_json(json.dumps(extra), SavedState, where)
        consumed, counted = saved.loader.samples, saved.monitor.count
        if consumed < saved.step or (saved.step == 0 and (consumed or saved.tokens)):
            raise UserError(f"{where}: {saved.step} steps cannot have consumed {consumed} sequences")
        if counted > saved.step:
            raise UserError(f"{where}: {saved.step} steps cannot have had {counted} losses")
        return saved
