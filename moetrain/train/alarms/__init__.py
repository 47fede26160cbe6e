"""Alarms: what is going wrong in a run, said once, with what may help; ``docs/tracking.md`` lists them."""

from moetrain.train.alarms.figures import StepFigures
from moetrain.train.alarms.watch import AlarmWatch, Event

__all__ = ["AlarmWatch", "Event", "StepFigures"]
