"""Arms of an experiment against each other: each arm is one config trained over several seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from moetrain.errors import UserError
from moetrain.report.columns import Array
from moetrain.report.dots import dots_figure
from moetrain.report.figures import KEY, ROUTING, late_mean, step_time
from moetrain.report.plotting import MISSING, has_matplotlib, label, new_figure, run_style, say_empty, style
from moetrain.report.runs import RunData, read_run
from moetrain.report.tables import NOTHING, fact, speed
from moetrain.writing import replacing

MAX_LINES = 7


def comparison_figure(arms: Mapping[str, Sequence[Path]], out: Path) -> Path:
    """Draw validation bits per byte over training tokens as a PNG: thin lines for seeds, strong for means.

    More arms than lines can show (:data:`MAX_LINES`) become dots instead (``dots.py``). ``arms``: name -> run
    folders. The mean covers the evaluations that all of the arm's runs have.
    Raises UserError without matplotlib, for a path that is no run folder, or where ``out`` cannot be written.
    """
    if not has_matplotlib():
        raise UserError(MISSING)
    if len(arms) > MAX_LINES:
        _save(dots_figure({name: [read_run(path) for path in paths] for name, paths in arms.items()}), out)
        return out
    with style():
        figure = new_figure(7.0, 4.2)
        axes = figure.subplots()
        for i, (name, paths) in enumerate(arms.items()):
            curves = [c for c in (_curve(read_run(path)) for path in paths) if c]
            look = run_style(i)
            for curve in curves:
                axes.plot(*_sorted(curve), color=look["color"], linewidth=0.8, alpha=0.45)
            if curves:
                common = set.intersection(*(set(curve) for curve in curves))
                mean = {x: sum(curve[x] for curve in curves) / len(curves) for x in common}
                axes.plot(
                    *_sorted(mean), label=_arm_label(name, len(curves)), marker="o", markersize=4, **look
                )
        axes.set(
            xlabel="training tokens", ylabel="validation bits per byte", title="Validation bits per byte"
        )
        if axes.lines:
            from matplotlib.ticker import EngFormatter

            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.legend()
        else:
            say_empty(axes, "no evaluation yet")
        _save(figure, out)
    return out


def comparison_table(arms: Mapping[str, Sequence[Path]]) -> str:
    """Markdown: one row per arm, mean and sample standard deviation over its runs of the last evaluation.

    The second column is of differences to the first arm's runs, run by run: seeds move all arms alike. Where
    an arm has routers, their figures follow (``figures.py``), as means over layers and the last tenth of the
    steps.
    """
    found = {name: [read_run(path) for path in paths] for name, paths in arms.items()}
    first = next(iter(found), "")
    columns: list[tuple[str, Callable[[list[RunData]], str]]] = [
        ("validation bits per byte", lambda runs: _mean_std([r.last(KEY) for r in runs], 4)),
        (f"minus {_escaped(first)}", lambda runs: _mean_std(_differences(runs, found[first]), 4)),
        ("validation loss (nats/token)", lambda runs: _mean_std([r.last("val/loss") for r in runs], 4)),
        ("parameters", lambda runs: _millions([fact(r, "params_total") for r in runs])),
        ("active parameters", lambda runs: _millions([fact(r, "params_active") for r in runs])),
        ("forward MFLOPs/token", lambda runs: _millions([fact(r, "flops_per_token") for r in runs], "")),
        ("training tokens", lambda runs: _millions([r.last("tokens") for r in runs])),
        ("tokens/s", lambda runs: _mean_std([speed(r) for r in runs], 0)),
    ]
    if any(run.layers("load_cv") for runs in found.values() for run in runs):
        columns += [(title, partial(_routing_cell, key=key)) for key, title in ROUTING.items()]
        columns.append(("ms/step", lambda runs: _mean_std([step_time(r) for r in runs], 0)))
    lines = ["| | runs | " + " | ".join(name for name, _ in columns) + " |"]
    lines.append("|---|" + "---:|" * (len(columns) + 1))
    for name, runs in found.items():
        cells = [_escaped(name), str(len(runs)), *(text(runs) for _, text in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _escaped(name: str) -> str:
    return name.replace("|", "\\|")


def _differences(runs: Sequence[RunData], others: Sequence[RunData]) -> list[float]:
    """Of bits per byte, run by run; none of a run to itself, or where the arms have other numbers of runs."""
    if runs is others or len(runs) != len(others):
        return []
    return [run.last(KEY) - other.last(KEY) for run, other in zip(runs, others, strict=True)]


def _routing_cell(runs: Sequence[RunData], key: str) -> str:
    return _mean_std([late_mean(run, key) for run in runs], 3)


def _curve(run: RunData) -> dict[float, float]:
    """Tokens -> bits per byte of each evaluation; or the tokens of the step's training row."""
    steps, values = run.series(KEY)
    tokens = dict(zip(*(a.tolist() for a in run.series("tokens")), strict=True))
    pairs = zip(steps.tolist(), values.tolist(), strict=True)
    return {tokens[s]: v for s, v in pairs if s in tokens and math.isfinite(v)}


def _sorted(curve: Mapping[float, float]) -> tuple[Array, Array]:
    x = sorted(curve)
    return np.array(x), np.array([curve[i] for i in x])


def _arm_label(name: str, count: int) -> str:
    return label(f"{name} (mean of {count})" if count > 1 else name)


def _save(figure: object, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary:
            figure.savefig(temporary, format="png", dpi=160)  # type: ignore[attr-defined]
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None


def _mean_std(values: Sequence[float], digits: int) -> str:
    """``1.9876 ± 0.0123``; without the second part for one value; ``-`` if any value is missing."""
    if not values or not all(math.isfinite(v) for v in values):
        return NOTHING
    mean = f"{np.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):,.{digits}f}"


def _millions(values: Sequence[float], unit: str = " M") -> str:
    """Millions with three digits; a range where the runs differ."""
    if not values or not all(math.isfinite(v) for v in values):
        return NOTHING
    low, high = (f"{v / 1e6:.3g}" if v < 1e9 else f"{v / 1e6:,.0f}" for v in (min(values), max(values)))
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"
