"""How every figure of the report looks and how it gets into the page. Needs matplotlib when called."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from moetrain.report.columns import Array

T = TypeVar("T")

# Okabe and Ito's colours, told apart by colour-blind readers; yellow is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
DASHES = ("-", "--", ":", "-.")  # the next style once the colours are used up
MISSING = "Plots need matplotlib: pip install 'moetrain[plot]'"
MAX_POINTS = 600
GUIDE = "guide"  # marks a line that spans the axes and is no data
SMOOTHING = 40  # the running mean's window is this part of the run

_STYLE: Any = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "text.color": "#222222",
    "xtick.color": "#222222",
    "ytick.color": "#222222",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.framealpha": 0.8,
    "legend.edgecolor": "none",
    "lines.linewidth": 1.5,
    "font.family": "DejaVu Sans",
    "svg.hashsalt": "moetrain",
}


@dataclass(frozen=True)
class Image:
    """The two attributes of an ``<img>``; ``source`` is a URL that holds the data."""

    alt: str
    source: str


@dataclass(frozen=True)
class Plot:
    """One figure, and what a reader must know about it."""

    image: Image
    caption: str = ""
    wide: bool = False


def has_matplotlib() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def style() -> Iterator[None]:
    """The report's look, for this block only: the caller's own matplotlib settings stay."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width: float = 5.4, height: float = 3.1) -> Any:
    """An empty figure in inches; it belongs to no window and needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def image(figure: Any, alt: str) -> Image:
    """The figure with its data inside (SVG as base64)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, dpi=160)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Image(alt, f"data:image/svg+xml;base64,{data}")


def run_style(index: int) -> dict[str, Any]:
    """Colour and dashes of the run (or arm) number ``index``."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
    }


def label(name: str) -> str:
    """A name as matplotlib text: dollar signs are no mathematics; a leading underscore would hide it."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def spread(items: Sequence[T], limit: int) -> list[T]:
    """At most ``limit`` of the items, evenly spaced, first and last included."""
    if len(items) <= limit:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]


def thin(x: Array, y: Array, limit: int = MAX_POINTS) -> tuple[Array, Array, Array, Array]:
    """``x``, mean, lowest and highest ``y`` of at most ``limit`` buckets; NaN where one has no number."""
    if len(x) <= limit:
        return x, y, y, y
    edges = np.linspace(0, len(x), limit + 1).astype(int)
    x_mean = np.array([x[a:b].mean() for a, b in itertools.pairwise(edges)])
    stats = np.full((3, limit), np.nan)
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        bucket = y[a:b][np.isfinite(y[a:b])]
        if len(bucket):
            stats[:, i] = bucket.mean(), bucket.min(), bucket.max()
    return x_mean, stats[0], stats[1], stats[2]


def running_mean(y: Array, window: int) -> Array:
    """Mean of the finite values in a centred window (no longer than ``y``); NaN where there is none."""
    finite = np.isfinite(y)
    ones = np.ones(max(1, window))
    total = np.convolve(np.where(finite, y, 0.0), ones, mode="same")
    count = np.convolve(finite.astype(float), ones, mode="same")
    return np.where(count > 0.5, total / np.maximum(count, 1.0), np.nan)


def robust_limits(values: Array, usual_top: float | None = None) -> tuple[float, float] | None:
    """Limits for an axis that a few huge values would flatten; None where all fit.

    ``usual_top``: what a sound curve does not exceed by much, if the caller knows.
    """
    values = values[np.isfinite(values)]
    if len(values) < 5:
        return None
    if usual_top is not None:
        low, room = float(values.min()), usual_top - float(values.min())
        return (low - 0.05 * room, usual_top + 0.15 * room) if values.max() - low > 2 * room > 0 else None
    low, usual, high = values.min(), np.percentile(values, 98), values.max()
    room = usual - low
    return (float(low - 0.05 * room), float(usual + 0.15 * room)) if high - low > 6 * room > 0 else None


def step_axis(axes: Any, label: str = "step") -> None:
    """Whole numbers from the first to the last step; a lone point gets room."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlabel(label)
    axes.margins(x=0.02)
    curves = [line.get_xdata() for line in axes.lines if line.get_gid() != GUIDE]
    points = np.concatenate([*curves, np.zeros(0)])
    if len(points) and points.min() == points.max():
        axes.set_xlim(points[0] - 1, points[0] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    if axes.get_xlim()[1] >= 10_000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def log_axis(axes: Any, decades: float) -> None:
    """A logarithmic y axis with plain numbers: the decades, and over few of them 2 and 5 as well."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    between = FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.yaxis.set_minor_formatter(between if decades < 3 else NullFormatter())


def trace(axes: Any, x: Array, y: Array, name: str, look: dict[str, Any], raw: bool = True) -> None:
    """A noisy curve: pale for every step (or each bucket's range), strong for the running mean."""
    if not len(x):
        return
    x_mean, mean, low, high = thin(x, y)
    if raw and len(x_mean) < len(x):
        axes.fill_between(x_mean, low, high, alpha=0.2, color=look["color"], linewidth=0)
    elif raw:
        axes.plot(x, y, color=look["color"], alpha=0.25, linewidth=0.8)
    smooth = running_mean(mean, len(mean) // SMOOTHING)
    dot = {"marker": "o", "markersize": 4} if np.isfinite(smooth).sum() <= 1 else {}
    axes.plot(x_mean, smooth, label=name, **look, **dot)


def say_empty(axes: Any, text: str = "no data") -> None:
    """A sentence in the middle of axes that would be blank."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#777777")
