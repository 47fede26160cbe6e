"""Targets: the alarms in a checkpoint's ``extra.json``, and those that a run folder keeps for its reader."""

from __future__ import annotations

import copy
import json
import math
from random import Random
from typing import Any

import numpy as np

from fuzz.forms import jsonl_file
from fuzz.of_checkpoint import EXTRA_FILE, resign, resumed
from fuzz.of_run import TABLES
from fuzz.target import Target, Way
from fuzz.trees import dump, mutate_tree, parse
from fuzz.world import EXPERTS, LAYERS
from moetrain.train.alarms import StepFigures

_NOTHING: dict[str, Any] = {"places": {}, "idle": {}, "loss": None}
_FRESH = {"bad": 0, "good": 0, "raised": False}
_STEPS = 3


def _alarms_only(rng: Random, data: bytes) -> tuple[bytes, str]:
    """An edit of the alarms; the rest of the document stays as it is."""
    document = parse(data)
    at = next(index for index, (key, _) in enumerate(document) if key == "alarms")
    tree, note = mutate_tree(rng, document[at][1])
    document[at] = ("alarms", tree)
    return dump(document).encode() + b"\n", f"alarms: {note}"


def _resume() -> dict[str, Any]:
    """The alarms as a run has them that goes on from the checkpoint, and what they say of its next steps."""
    state, path = resumed()
    assert state.alarms is not None
    kept = copy.deepcopy(state.alarms.state_dict())
    rows = [event.row() for n in range(_STEPS) for event in state.alarms.observe(_figures(n))]
    document = json.loads((path / "extra.json").read_bytes())
    return {"alarms": kept, "said": json.dumps([rows, state.alarms.state_dict()]), "document": document}


def _figures(number: int) -> StepFigures:
    """A step in which one layer has collapsed and the other has not."""
    tokens = 64
    counts = {0: np.full(EXPERTS, tokens), 1: np.zeros(EXPERTS, np.int64)}
    counts[1][:2] = tokens
    row = {"step": 5 + number, "train/loss": 3.0, "tokens_per_second": 100.0, "time": 1.0 * number}
    for layer in range(LAYERS):
        row |= {f"moe/{layer}/{key}": 0.5 for key in ("entropy", "logit_rms", "experts_per_token")}
    return StepFigures(row, counts, counts)


def _fits(good: Any, found: Any) -> str | None:
    """What the document says of alarms that there are, every value of its type and in its range."""
    saved = found["document"].get("alarms")
    try:
        expected = _meant(_NOTHING if saved is None else saved, names=list(good["alarms"]["places"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"differs: {str(saved)[:60]} was taken: {error!r}"
    if found["alarms"] != expected:
        return f"differs: {str(found['alarms'])[:80]}, not the document's"
    return None


def _meant(saved: Any, names: list[str]) -> dict[str, Any]:
    places: dict[str, Any] = {name: {} for name in names}
    for name, of_alarm in saved["places"].items():
        for number, place in of_alarm.items():
            one = {"bad": _count(place["bad"]), "good": _count(place["good"]), "raised": place["raised"]}
            if type(one["raised"]) is not bool:
                raise ValueError("raised")
            if name in places:
                places[name][_layer(number)] = one
    for name, of_alarm in places.items():
        places[name] = {number: one for number, one in of_alarm.items() if one != _FRESH}
    idle = {_layer(number): [_count(steps) for steps in steps_E] for number, steps_E in saved["idle"].items()}
    idle = {number: steps_E for number, steps_E in idle.items() if any(steps_E)}
    loss = saved.get("loss")
    if loss is None:
        loss = {"sum": 0.0, "count": 0}
    elif type(loss["sum"]) not in (int, float) or not math.isfinite(loss["sum"]):
        raise ValueError("loss.sum")
    return {"places": places, "idle": idle, "loss": {"sum": loss["sum"], "count": _count(loss["count"])}}


def _layer(number: str) -> str:
    if not number.removeprefix("-").isdecimal() or int(number) < -1:
        raise ValueError(number)
    return str(int(number))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(value)
    return value


TARGETS = [
    Target(
        "checkpoint_alarms",
        ("run", "cache", "text"),
        (EXTRA_FILE,),
        _alarms_only,
        (Way("resume", _resume, _fits),),
        resign,
    ),
    Target("report_alarms", ("run",), ("run/alarms.jsonl",), jsonl_file, TABLES),
]
