"""The line plots: loss, learning rate, gradient norm, throughput, and the routing figures per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moetrain.report.columns import Array
from moetrain.report.plotting import (
    COLOURS,
    GUIDE,
    SMOOTHING,
    Plot,
    image,
    label,
    log_axis,
    new_figure,
    robust_limits,
    run_style,
    running_mean,
    say_empty,
    spread,
    step_axis,
    thin,
    trace,
)
from moetrain.report.runs import RunData

Curves = dict[int, tuple[Array, Array]]  # layer -> steps and values
SMOOTHED = "Pale: every step. Strong: running mean over a fortieth of the run."
MAX_LINES = 8  # layers drawn one by one; more are thinned out and the mean is added


@dataclass(frozen=True)
class LayerFigure:
    """A routing metric that has one curve per MoE layer."""

    name: str
    title: str
    unit: str
    note: str
    percent: bool = False


LAYER_FIGURES = (
    LayerFigure("max_load", "Busiest expert", "max / mean load", "1 is perfect balance."),
    LayerFigure("load_cv", "Spread of the load", "std / mean load", "0 is perfect balance."),
    LayerFigure("entropy", "Router entropy", "entropy (nats)", "Low: each token is sure of its experts."),
    LayerFigure("logit_rms", "Size of the logits", "root mean square", "Growing: z-loss is missing or weak."),
    LayerFigure("drop_rate", "Dropped assignments", "dropped (%)", "Wanted but over capacity.", percent=True),
    LayerFigure("router_similarity", "Likeness of router rows", "mean |cosine|", "1: rows are all alike."),
    LayerFigure("congestion", "Congestion", "gamma", "Large: balance outweighs what tokens like."),
    LayerFigure("dead_experts", "Dead experts", "experts without a token", "Experts idle for a whole step."),
)


def loss_plot(runs: Sequence[RunData]) -> Plot | None:
    """Training loss (each step pale, running mean strong) and validation loss (marked points)."""
    figure = new_figure()
    axes = figure.subplots()
    seen, first = [], []
    for i, run in enumerate(runs):
        prefix = f"{label(run.name)}: " if len(runs) > 1 else ""
        look = run_style(i)
        steps, loss = run.series("train/loss")
        if len(steps):
            trace(axes, steps, loss, f"{prefix}training", look)
            seen.append(loss)
            first.append(loss[np.isfinite(loss)][: max(5, len(loss) // 100)])
        steps, loss = run.series("val/loss")
        if len(steps):
            colour = COLOURS[1] if len(runs) == 1 else look["color"]
            axes.plot(
                steps, loss, "o--", color=colour, label=f"{prefix}validation", markersize=4, linewidth=1
            )
            seen.append(loss)
    if not seen:
        return None
    start = np.concatenate([*first, np.array([])])
    limits = robust_limits(np.concatenate(seen), start.max() if len(start) else None)
    unit = "cross entropy (nats per token)"
    return _finish(figure, axes, "Loss", unit, seen, SMOOTHED, limits=limits)


def simple_plot(
    runs: Sequence[RunData],
    key: str,
    title: str,
    unit: str,
    *,
    marker: bool = False,
    noisy: bool = False,
    log: bool = False,
) -> Plot | None:
    """One curve per run of one key; None if no run has it.

    ``marker``: few points, marked. ``noisy``: with a running mean. ``log``: a logarithmic axis where the
    values span a factor of 5.
    """
    figure = new_figure()
    axes = figure.subplots()
    seen = []
    for i, run in enumerate(runs):
        steps, values = run.series(key)
        if not len(steps):
            continue
        if noisy:
            trace(axes, steps, values, label(run.name), run_style(i))
        else:
            x, mean, _, _ = thin(steps, values)
            mark = {"marker": "o", "markersize": 4} if marker or len(x) == 1 else {}
            axes.plot(x, mean, label=label(run.name), **run_style(i), **mark)
        seen.append(values)
    if not seen:
        return None
    values = np.concatenate(seen)
    positive = values[np.isfinite(values) & (values > 0)]
    limits = None
    if log and len(positive) and positive.max() > 5 * positive.min():
        log_axis(axes, math.log10(positive.max() / positive.min()))
    else:
        limits = robust_limits(values)
    caption = SMOOTHED if noisy else ""
    return _finish(figure, axes, title, unit, seen, caption, legend=len(runs) > 1, limits=limits)


def bits_per_byte_plot(runs: Sequence[RunData]) -> Plot | None:
    """Validation bits per byte; None before the second evaluation, while the table says it all."""
    key = "val/bits_per_byte"
    if max(len(run.series(key)[0]) for run in runs) < 2:
        return None
    return simple_plot(runs, key, "Validation bits per byte", "bits per byte", marker=True)


def layer_plot(runs: Sequence[RunData], what: LayerFigure) -> Plot | None:
    """One run: a curve per layer. Several: the mean over layers, in a band from the least to the greatest.

    None without such a metric, and for dead experts where there are none.
    """
    runs_with = [(i, run) for i, run in enumerate(runs) if run.layers(what.name)]
    if not runs_with or (what.name == "dead_experts" and never_dead(runs)):
        return None
    figure = new_figure()
    axes = figure.subplots()
    scale = 100.0 if what.percent else 1.0
    seen = []
    curves: Curves = {}
    for i, run in runs_with:
        curves = {layer: run.series(f"moe/{layer}/{what.name}") for layer in run.layers(what.name)}
        curves = {layer: (x, scale * y) for layer, (x, y) in curves.items()}
        if len(runs) == 1:
            _layers_apart(axes, curves)
        else:
            _layers_together(axes, curves, label(run.name), run_style(i))
        seen += [y for _, y in curves.values()]
    caption = f"{what.note} Running mean over a fortieth of the run."
    loads = [run.loads for _, run in runs_with if run.loads is not None]
    experts = {share_PE.shape[1] for of_run in loads for share_PE in of_run.shares}
    if what.name == "entropy" and experts:
        caption += f" The dotted line{'s are' if len(experts) > 1 else ' is'} a uniform router."
        for count in experts:
            axes.axhline(math.log(count), color="#777777", linestyle=":", linewidth=1, gid=GUIDE)
    none_dropped = what.name == "drop_rate" and not any(np.nansum(y) for y in seen)
    if none_dropped:
        axes.set_ylim(0, 1)
        say_empty(axes, "none at any step")
    if len(runs) > 1:
        caption += " Line: mean over the MoE layers; band: from the lowest to the highest layer."
    elif len(curves) > MAX_LINES:
        caption += f" {MAX_LINES} of {len(curves)} MoE layers are drawn; black is the mean over all."
    limits = robust_limits(np.concatenate(seen))
    return _finish(figure, axes, what.title, what.unit, seen, caption, legend=not none_dropped, limits=limits)


def never_dead(runs: Sequence[RunData]) -> bool:
    """Whether no expert of any layer was without a token at any step."""
    keys = ((run, f"moe/{layer}/dead_experts") for run in runs for layer in run.layers("dead_experts"))
    return not any(np.nansum(run.series(key)[1]) for run, key in keys)


def _layers_apart(axes: Any, curves: Curves) -> None:
    from matplotlib import colormaps

    shown = spread(sorted(curves), MAX_LINES)
    for i, layer in enumerate(shown):
        look = {"color": colormaps["viridis"](0.9 * i / max(1, len(shown) - 1)), "linewidth": 1.2}
        trace(axes, *curves[layer], f"layer {layer}", look, raw=False)
    if len(curves) > MAX_LINES:
        steps, values = _on_common_steps(curves)
        trace(axes, steps, values.mean(axis=0), "mean", {"color": "#111111", "linewidth": 1.8}, raw=False)


def _layers_together(axes: Any, curves: Curves, name: str, look: dict[str, Any]) -> None:
    steps, values = _on_common_steps(curves)
    if not len(steps):
        return
    trace(axes, steps, values.mean(axis=0), name, look, raw=False)
    if len(values) > 1:
        (x, low, _, _), (_, high, _, _) = thin(steps, values.min(axis=0)), thin(steps, values.max(axis=0))
        low, high = (running_mean(edge, len(edge) // SMOOTHING) for edge in (low, high))
        axes.fill_between(x, low, high, alpha=0.15, color=look["color"], linewidth=0)


def _on_common_steps(curves: Curves) -> tuple[Array, Array]:
    """Steps that every layer has, and the values there [layers, steps]."""
    tables = [dict(zip(x.tolist(), y.tolist(), strict=True)) for x, y in curves.values()]
    common = sorted(set.intersection(*(set(table) for table in tables)))
    values = np.array([[table[step] for step in common] for table in tables])
    return np.array(common), values.reshape(len(curves), len(common))


def _finish(
    figure: Any,
    axes: Any,
    title: str,
    unit: str,
    seen: Sequence[Array],
    caption: str = "",
    legend: bool = True,
    limits: tuple[float, float] | None = None,
) -> Plot:
    axes.set_title(title)
    axes.set_ylabel(unit)
    values = np.concatenate(seen)
    finite = values[np.isfinite(values)]
    if limits is not None:
        axes.set_ylim(limits)
        caption += f" Values above {limits[1]:.3g} are cut off (up to {finite.max():.3g})."
    if bad := len(values) - len(finite):
        caption += f" {bad} value{'s' if bad > 1 else ''} NaN or infinite: not drawn."
    if not len(finite):
        say_empty(axes, "no finite value")
    step_axis(axes)
    if legend and (entries := len(axes.get_legend_handles_labels()[0])):
        axes.legend(ncols=1 if entries <= 4 else 2)
    return Plot(image(figure, f"{title}: {unit} over steps"), caption.strip())
