"""Many arms of an experiment at a glance: one row an arm, one panel a figure, a dot for each run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from moetrain.report.figures import KEY, ROUTING, late_mean, step_time
from moetrain.report.plotting import COLOURS, label, new_figure, style
from moetrain.report.runs import RunData

WIDE = 20.0


def dots_figure(arms: Mapping[str, Sequence[RunData]]) -> Any:
    """Arms from the lowest validation bits per byte up; a tick marks each arm's mean, a line the first arm's.

    A panel whose largest value is more than :data:`WIDE` times its median goes by a symmetric log scale.
    """
    panels: list[tuple[str, Callable[[RunData], float]]] = [("bits per byte", lambda run: run.last(KEY))]
    panels += [(title, partial(late_mean, name=key)) for key, title in ROUTING.items()]
    panels.append(("ms/step", step_time))
    order = sorted(arms, key=lambda name: _mean([run.last(KEY) for run in arms[name]]), reverse=True)
    with style():
        figure = new_figure(13.0, 0.9 + 0.26 * len(arms))
        all_axes = figure.subplots(1, len(panels), sharey=True)
        for axes, (title, value) in zip(all_axes, panels, strict=True):
            shown = {name: [v for run in arms[name] if math.isfinite(v := value(run))] for name in order}
            for row, values in enumerate(shown.values()):
                axes.plot(values, [row] * len(values), "o", color=COLOURS[0], alpha=0.5, markersize=4)
                if values:
                    axes.plot([_mean(values)], [row], "|", color=COLOURS[1], markersize=11, markeredgewidth=2)
            reference = _mean(shown[next(iter(arms))])
            if math.isfinite(reference):
                axes.axvline(reference, color=COLOURS[1], linewidth=0.8, linestyle="--", zorder=0)
            _log_where_wide(axes, [v for values in shown.values() for v in values])
            axes.set_title(title)
            axes.margins(x=0.08)
        all_axes[0].set_yticks(range(len(order)), [label(name) for name in order])
        all_axes[0].set_ylim(-0.7, len(order) - 0.3)
    return figure


def _log_where_wide(axes: Any, values: Sequence[float]) -> None:
    """Few values far above all others would press these into one line."""
    middle = float(np.median(values)) if values else 0.0
    if middle > 0 and min(values) >= 0 and max(values) > WIDE * middle:
        axes.set_xscale("symlog", linthresh=middle)


def _mean(values: Sequence[float]) -> float:
    """NaN, which sorts nowhere, becomes infinity."""
    mean = float(np.mean(values)) if values else math.nan
    return mean if math.isfinite(mean) else math.inf
