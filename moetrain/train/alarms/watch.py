"""The alarms of a run: when one is raised, when it clears, and what of it a checkpoint keeps.

An alarm is raised at a place (a layer, or the run) after bad readings in a row, is then silent, and clears
after as many good ones. All of it is a function of the steps' figures, and resumes with the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from moetrain.checkpoint.saved_state import SavedAlarms
from moetrain.train.alarms.course import LossSpike, SlowSteps
from moetrain.train.alarms.figures import WHOLE, Reading, StepFigures
from moetrain.train.alarms.options import AlarmsConfig
from moetrain.train.alarms.routing import (
    Collapse,
    DeadExperts,
    ImbalanceCost,
    LargeLogits,
    LowEntropy,
    Ranks,
)

_NAMED = 4  # layers in one line

Suggest = Callable[[str], str | None]  # the name of an alarm -> an override that may help


class Alarm(Protocol):
    """Looks at one step. A class may set ``patience`` of its own, and ``resumes`` to False."""

    name: str

    def look(self, figures: StepFigures) -> Mapping[int, Reading]: ...


@dataclass
class Place:
    """Readings in a row: ``bad`` ones before an alarm is raised, ``good`` ones before it clears."""

    bad: int = 0
    good: int = 0
    raised: bool = False


@dataclass(frozen=True)
class Event:
    """An alarm that was raised, or has cleared, at one step. ``layers`` is empty where it is of the run."""

    step: int
    alarm: str
    raised: bool
    layers: tuple[int, ...]
    value: float
    why: str
    suggestion: str | None

    def line(self) -> str:
        """One line for the log."""
        where = f" in {layers_named(self.layers)}" if self.layers else ""
        if not self.raised:
            return f"step {self.step}: alarm over: {self.alarm}{where} ({self.why})"
        helps = f"; may help: {self.suggestion}" if self.suggestion else ""
        return f"step {self.step}: ALARM {self.alarm}{where}: {self.why}{helps}"

    def row(self) -> dict[str, Any]:
        """A row of ``alarms.jsonl``."""
        return asdict(self) | {"layers": list(self.layers)}


class AlarmWatch:
    """All alarms of a run that are switched on. ``suggest``: what to say beside an alarm of a name."""

    def __init__(self, cfg: AlarmsConfig, suggest: Suggest, ranks: Ranks, experts_share: float) -> None:
        self._cfg, self._suggest = cfg, suggest
        self._alarms = _alarms(cfg, ranks, experts_share) if cfg.enabled else []
        self._places: dict[str, dict[int, Place]] = {alarm.name: {} for alarm in self._alarms}

    def observe(self, figures: StepFigures) -> list[Event]:
        """What this step raised or cleared, an event for each alarm at most for either."""
        events = []
        for alarm in self._alarms:
            changed = self._changes(alarm, alarm.look(figures))
            for raised in (True, False):
                if found := {place: reading for place, reading, now in changed if now is raised}:
                    events.append(self._event(figures.step, alarm.name, raised, found))
        return events

    def state_dict(self) -> dict[str, Any]:
        """What :class:`SavedAlarms` describes."""
        state: dict[str, Any] = {"places": {}, "idle": {}, "loss": None}
        for alarm in self._alarms:
            if getattr(alarm, "resumes", True):
                places = self._places[alarm.name].items()
                state["places"][alarm.name] = {str(n): asdict(p) for n, p in places if p != Place()}
            if isinstance(alarm, DeadExperts):
                state["idle"] = {str(n): idle_E.tolist() for n, idle_E in alarm.idle.items() if idle_E.any()}
            elif isinstance(alarm, LossSpike):
                state["loss"] = alarm.monitor.state_dict()
        return state

    def load_state_dict(self, saved: SavedAlarms | None) -> None:
        """Go on from a checkpoint; None, of one without: begin anew."""
        for alarm in self._alarms:
            kept = {} if saved is None else saved.places.get(alarm.name, {})
            self._places[alarm.name] = {int(n): Place(p.bad, p.good, p.raised) for n, p in kept.items()}
            if isinstance(alarm, DeadExperts):
                idle = {} if saved is None else saved.idle
                alarm.idle = {int(n): np.array(steps, np.int64) for n, steps in idle.items()}
            elif isinstance(alarm, LossSpike):
                loss = None if saved is None else saved.loss
                alarm.monitor.load_state_dict({"sum": 0.0, "count": 0} if loss is None else asdict(loss))

    def _changes(self, alarm: Alarm, readings: Mapping[int, Reading]) -> list[tuple[int, Reading, bool]]:
        """(place, reading, whether raised) of the places whose state this step changes."""
        places, changed = self._places[alarm.name], []
        patience = getattr(alarm, "patience", self._cfg.patience)
        for number, reading in readings.items():
            place = places.setdefault(number, Place())
            place.bad, place.good = (place.bad + 1, 0) if reading.bad else (0, place.good + 1)
            if not place.raised and place.bad >= patience:
                place.raised = True
                changed.append((number, reading, True))
            elif place.raised and place.good >= self._cfg.patience:
                place.raised = False
                changed.append((number, reading, False))
            place.bad = min(place.bad, patience)  # what lies beyond changes nothing, and is not saved
            place.good = min(place.good, self._cfg.patience) if place.raised else 0
        return changed

    def _event(self, step: int, name: str, raised: bool, found: Mapping[int, Reading]) -> Event:
        first = next(iter(found.values()))
        layers = tuple(number for number in found if number != WHOLE)
        suggestion = self._suggest(name) if raised else None
        return Event(step, name, raised, layers, first.value, first.why, suggestion)


def layers_named(layers: Sequence[int]) -> str:
    """``layer 3``, or ``layers 0, 1, 2, 3 and 60 more``."""
    some = ", ".join(map(str, layers[:_NAMED]))
    more = f" and {len(layers) - _NAMED} more" if len(layers) > _NAMED else ""
    return f"layer{'s' if len(layers) > 1 else ''} {some}{more}"


def _alarms(cfg: AlarmsConfig, ranks: Ranks, experts_share: float) -> list[Alarm]:
    alarms: list[Alarm | None] = [
        None if cfg.collapse is None else Collapse(cfg.collapse),
        None if cfg.dead_steps is None else DeadExperts(cfg.dead_steps),
        None if cfg.entropy is None else LowEntropy(cfg.entropy),
        None if cfg.logit_rms is None else LargeLogits(cfg.logit_rms),
        None if cfg.imbalance_cost is None else ImbalanceCost(cfg.imbalance_cost, ranks, experts_share),
        None if cfg.loss_spike is None else LossSpike(cfg.loss_spike),
        None if cfg.throughput is None else SlowSteps(cfg.throughput),
    ]
    return [alarm for alarm in alarms if alarm is not None]
