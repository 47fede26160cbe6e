"""Which expert got how much, in colour: layer x expert at the end, and expert x step for each layer.

Shapes: P recorded steps, L MoE layers, E experts (of the layer that has the most, where all share a map).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moetrain.report.columns import Array, Loads
from moetrain.report.plotting import Plot, image, new_figure, spread

MAX_LAYERS = 12  # small maps
MAX_EXPERTS = 64  # rows of a small map
MAX_COLUMNS = 200  # steps of a small map, after averaging neighbours
_FINAL_SHARE = 0.1  # the last tenth of the recorded steps makes the final map


def over_time(loads: Loads, name: str) -> Plot:
    """One small map per MoE layer (expert by step), all on one colour scale."""
    shown = spread(list(range(len(loads.layers))), MAX_LAYERS)
    steps, relative = _averaged(loads.steps, loads.relative)
    every = np.concatenate([relative_PE.ravel() for relative_PE in relative])
    norm = _norm(every)
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure = new_figure(1.2 + 2.45 * columns, 0.6 + 1.75 * lines)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
    mesh: Any = None
    for place, axes in enumerate(grid.flat):
        if place >= len(shown):
            axes.set_visible(False)
            continue
        index = shown[place]
        experts = _experts_shown(relative[index])
        values_EP = relative[index][:, experts].T
        mesh = axes.pcolormesh(_edges(steps), np.arange(len(experts) + 1) - 0.5, values_EP, norm=norm,
                               cmap="RdBu_r", rasterized=True)  # fmt: skip
        axes.set_title(f"layer {loads.layers[index]}", fontsize=9)
        _expert_axis(axes, experts, "y", label=place % columns == 0)
        _few_steps(axes, label=place + columns >= len(shown))
    _colour_bar(figure, mesh, grid, every)
    return Plot(
        image(figure, f"{name}: expert load over steps, per layer"), _caption(loads, shown), wide=True
    )


def final_map(loads: Loads, name: str) -> Plot:
    """One map of layer by expert, the mean over the last tenth of the recorded steps."""
    count = max(1, round(_FINAL_SHARE * len(loads.steps)))
    rows = [relative_PE[-count:].mean(axis=0) for relative_PE in loads.relative]
    layers, experts = len(rows), max(map(len, rows))
    relative_LE = np.full((layers, experts), np.nan)  # no cell for an expert that a layer has not
    for row, relative_E in enumerate(rows):
        relative_LE[row, : len(relative_E)] = relative_E
    present = relative_LE[~np.isnan(relative_LE)]
    figure = new_figure(min(10.5, 2.4 + 0.42 * max(experts, 6)), min(6.5, 1.3 + 0.2 * max(layers, 4)))
    axes = figure.subplots()
    mesh = axes.pcolormesh(
        np.arange(experts + 1) - 0.5, np.arange(layers + 1) - 0.5, relative_LE,
        norm=_norm(present), cmap="RdBu_r", rasterized=True,
    )  # fmt: skip
    axes.invert_yaxis()
    ticks = _every_nth(layers, 24)
    axes.set_yticks(ticks, [str(loads.layers[i]) for i in ticks])
    axes.set_ylabel("MoE layer")
    _expert_axis(axes, list(range(experts)), "x", label=True)
    axes.grid(False)
    if experts <= 16 and layers <= 16:
        _write_values(axes, relative_LE, mesh.norm)
    _colour_bar(figure, mesh, axes, present)
    first, last = loads.steps[-count], loads.steps[-1]
    span = f"Mean of the {count} recorded steps from {first:.0f} to" if count > 1 else "Recorded at step"
    caption = f"{span} {last:.0f}. White is the uniform share."
    return Plot(image(figure, f"{name}: expert load at the end, layer by expert"), caption, wide=True)


def _averaged(steps: Array, relative: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
    """Neighbouring steps averaged so that at most MAX_COLUMNS are left."""
    if len(steps) <= MAX_COLUMNS:
        return steps, relative
    parts = np.array_split(np.arange(len(steps)), MAX_COLUMNS)
    means = (np.stack([relative_PE[p].mean(0) for p in parts]) for relative_PE in relative)
    return np.array([steps[p].mean() for p in parts]), tuple(means)


def _norm(relative: Array) -> Any:
    """Blue below, white at, red above the uniform share; a few extreme values do not stretch the scale."""
    from matplotlib.colors import TwoSlopeNorm

    return TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=max(2.0, float(np.percentile(relative, 99.5))))


def _colour_bar(figure: Any, mesh: Any, axes: Any, relative: Array) -> None:
    beyond = "max" if relative.max() > mesh.norm.vmax else "neither"
    bar = figure.colorbar(mesh, ax=axes, extend=beyond, aspect=25, pad=0.02)
    bar.set_label("share (x uniform)")


def _experts_shown(relative_PE: Array) -> list[int]:
    """All experts, or where they are too many the busiest half and the idlest half of MAX_EXPERTS."""
    experts = relative_PE.shape[1]
    if experts <= MAX_EXPERTS:
        return list(range(experts))
    order = np.argsort(relative_PE.mean(axis=0), kind="stable")
    half = MAX_EXPERTS // 2
    return [int(e) for e in (*order[:half], *order[-half:])]


def _edges(steps: Array) -> Array:
    """Cell borders half-way between the recorded steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def _expert_axis(axes: Any, experts: list[int], side: str, label: bool) -> None:
    axes.grid(False)
    if experts == list(range(len(experts))):
        text, ticks = "expert", _every_nth(len(experts), 16 if side == "x" else 8)
    else:
        text, ticks = "idlest to busiest", []
    axes.set(**{f"{side}ticks": ticks})
    if label:
        axes.set(**{f"{side}label": text})


def _every_nth(count: int, limit: int) -> list[int]:
    return list(range(0, count, -(-count // limit)))


def _few_steps(axes: Any, label: bool) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
    if axes.get_xlim()[1] >= 10_000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(labelbottom=label)
    if label:
        axes.set_xlabel("step")


def _write_values(axes: Any, relative_LE: Array, norm: Any) -> None:
    for (layer, expert), value in np.ndenumerate(relative_LE):
        if np.isnan(value):
            continue
        colour = "white" if abs(norm(value) - 0.5) > 0.33 else "#222222"
        axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)


def _caption(loads: Loads, shown: list[int]) -> str:
    layers, most = len(loads.shares), max(share_PE.shape[1] for share_PE in loads.shares)
    text = "White is the uniform share, red more, blue less; deep blue is a dead expert."
    if len(shown) < layers:
        text += f" {len(shown)} of {layers} MoE layers are shown, evenly spaced."
    if most > MAX_EXPERTS:
        half = MAX_EXPERTS // 2
        text += (
            f" Of {most} experts, each map shows the {half} idlest (below) and the {half} busiest (above)."
        )
    if len(loads.steps) > MAX_COLUMNS:
        text += f" {len(loads.steps)} recorded steps are averaged into {MAX_COLUMNS} columns."
    return text
