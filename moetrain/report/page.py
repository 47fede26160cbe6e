"""One self-contained HTML file about one run, or about several side by side: ``page.html.jinja``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from moetrain.errors import UserError
from moetrain.report import curves, heatmap
from moetrain.report.plotting import MISSING, Plot, has_matplotlib, style
from moetrain.report.runs import RunData, read_runs
from moetrain.report.tables import alarm_table, config_differences, domain_table, headline
from moetrain.writing import replacing

MAX_MAPS = 6  # runs whose load maps are drawn
MAX_SAMPLES = 10
MAX_CHARACTERS = 4000  # of one sample


@dataclass(frozen=True)
class Section:
    """A heading with plots below it; a string in a plot's place says why there is none."""

    title: str
    plots: list[Plot | str] | None
    remark: str = ""
    note: str = ""


@dataclass(frozen=True)
class Samples:
    """Titles and texts of a run's samples, the newest first."""

    texts: list[tuple[str, str]]
    remark: str


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the report of ``run_dirs`` to ``out`` (whole or not at all) and return ``out``.

    Missing, torn or partial files in a run folder are named in the report. Without matplotlib the tables
    stand alone. Raises UserError for a path that is no run folder, or where ``out`` cannot be written.
    """
    if not run_dirs:
        raise UserError("report: no run folder given")
    text = render(read_runs(run_dirs))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary:
            # Odd file names and torn text may hold lone surrogates.
            temporary.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"report: cannot write {out}: {error.strerror}") from None
    return out


def render(runs: Sequence[RunData]) -> str:
    """The page's text."""
    several = len(runs) > 1
    tables = [("", headline(runs)), ("Alarms", alarm_table(runs))]
    tables.append(("Validation by domain", domain_table(runs)))
    if several:
        tables.append(("What differs", config_differences(runs)))
    return _template().render(
        title=f"{len(runs)} runs" if several else runs[0].name,
        path="" if several else str(runs[0].path),
        notes=[f"{run.name}: {note}" for run in runs for note in run.notes],
        tables=[(title, table) for title, table in tables if table],
        sections=_sections(runs),
        samples=[_samples(run, several) for run in runs if run.samples],
        settings=[item for run in runs for item in _settings(run, several)],
    )


@cache
def _template() -> Template:
    loader = PackageLoader("moetrain.report", "")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.jinja")


def _sections(runs: Sequence[RunData]) -> list[Section]:
    if not any(run.columns or run.loads for run in runs):
        return [Section("Training", None, remark="Nothing to plot yet.")]
    if not has_matplotlib():
        return [Section("Training", None, note=f"{MISSING}, then run moetrain report on the same folder.")]
    with style():
        sections = [Section("Training", _drawn(_training_plots(runs)))]
        if any(run.layers("max_load") for run in runs):
            sections.append(Section("Routing", _drawn(_routing_plots(runs))))
        if any(run.layers("dead_experts") for run in runs) and curves.never_dead(runs):
            remark = "No expert was without a token at any recorded step."
            sections[-1] = replace(sections[-1], remark=remark)
        mapped = [run for run in runs if run.loads is not None]
        for run in mapped[:MAX_MAPS]:
            title = f"Expert load: {run.name}" if len(runs) > 1 else "Expert load"
            sections.append(Section(title, _drawn(_load_plots(run))))
    if len(mapped) > MAX_MAPS:
        note = f"Load maps are drawn for the first {MAX_MAPS} of {len(mapped)} runs."
        sections[-1] = replace(sections[-1], note=note)
    return sections


def _training_plots(runs: Sequence[RunData]) -> list[tuple[str, Callable[[], Plot | None]]]:
    simple = curves.simple_plot
    return [
        ("loss", lambda: curves.loss_plot(runs)),
        ("bits per byte", lambda: curves.bits_per_byte_plot(runs)),
        ("learning rate", lambda: simple(runs, "train/lr", "Learning rate", "learning rate")),
        (
            "gradient norm",
            lambda: simple(
                runs, "train/grad_norm", "Gradient norm", "L2 norm before clipping", noisy=True, log=True
            ),
        ),
        (
            "throughput",
            lambda: simple(runs, "tokens_per_second", "Throughput", "tokens per second", noisy=True),
        ),
    ]


def _routing_plots(runs: Sequence[RunData]) -> list[tuple[str, Callable[[], Plot | None]]]:
    return [(what.title, partial(curves.layer_plot, runs, what)) for what in curves.LAYER_FIGURES]


def _load_plots(run: RunData) -> list[tuple[str, Callable[[], Plot | None]]]:
    loads = run.loads
    assert loads is not None
    return [
        ("final load map", lambda: heatmap.final_map(loads, run.name)),
        ("load maps", lambda: heatmap.over_time(loads, run.name)),
    ]


def _drawn(plots: Sequence[tuple[str, Callable[[], Plot | None]]]) -> list[Plot | str]:
    figures: list[Plot | str] = []
    for name, draw in plots:
        try:
            plot = draw()
        except Exception as error:  # one odd file must not cost the reader the rest of the report
            figures.append(f"The plot of {name} could not be drawn: {type(error).__name__}: {error}")
            continue
        if plot is not None:
            figures.append(plot)
    return figures


def _samples(run: RunData, named: bool) -> Samples:
    """The newest ``MAX_SAMPLES``, each cut to ``MAX_CHARACTERS``."""
    texts = []
    for name, text in reversed(run.samples[-MAX_SAMPLES:]):
        cut = " (cut)" if len(text) > MAX_CHARACTERS else ""
        title = f"{run.name}: {name}{cut}" if named else f"{name}{cut}"
        texts.append((title, text[:MAX_CHARACTERS]))
    more = len(run.samples) > MAX_SAMPLES
    return Samples(texts, f"The newest {MAX_SAMPLES} of {len(run.samples)} samples." if more else "")


def _settings(run: RunData, named: bool) -> list[tuple[str, str]]:
    """Title and text of what the run was told and what it left."""
    prefix = f"{run.name}: " if named else ""
    blocks = [
        ("config", run.config_text),
        ("environment", json.dumps(run.environment, indent=2, ensure_ascii=False) if run.environment else ""),
        ("summary", json.dumps(run.summary, indent=2, ensure_ascii=False) if run.summary else ""),
    ]
    return [(prefix + name, text) for name, text in blocks if text]
