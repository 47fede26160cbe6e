"""One self-contained HTML file about one run, or about several side by side."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from moetrain.errors import UserError
from moetrain.report import curves, heatmap
from moetrain.report.plotting import MISSING, Plot, has_matplotlib, style
from moetrain.report.runs import RunData, read_runs
from moetrain.report.tables import Table, config_differences, domain_table, headline

MAX_MAPS = 6  # runs whose load maps are drawn
MAX_SAMPLES = 10
MAX_CHARACTERS = 4000  # of one sample

# Nothing may be fetched: the policy makes a browser hold to it.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
body {{ margin: 0 auto; padding: 1.5rem; max-width: 1120px; background: #fff; color: #222;
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin: 2rem 0 .6rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem;
  overflow-wrap: anywhere; }}
.muted, figcaption {{ color: #666; font-size: .85rem; }}
.note {{ background: #fff6e0; border-left: 4px solid #e69f00; padding: .4rem .8rem; margin: .5rem 0; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #eee; overflow-wrap: anywhere; }}
thead th {{ border-bottom: 2px solid #bbb; }}
tbody th {{ font-weight: normal; color: #555; white-space: nowrap; }}
.plots {{ display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }}
.plots .wide {{ grid-column: 1 / -1; }}
figure {{ margin: 0; }}
figure img {{ max-width: 100%; height: auto; }}
pre {{ background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .85rem; line-height: 1.4; }}
pre.sample {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
details {{ margin: .5rem 0; }}
summary {{ cursor: pointer; }}
</style>
</head>
<body>
"""


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the report of ``run_dirs`` to ``out`` (whole or not at all) and return ``out``.

    Missing, torn or partial files in a run folder are named in the report. Without matplotlib the tables
    stand alone. Raises UserError for a path that is no run folder, or where ``out`` cannot be written.
    """
    if not run_dirs:
        raise UserError("report: no run folder given")
    text = render(read_runs(run_dirs))
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Odd file names and torn text may hold lone surrogates.
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, out)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"report: cannot write {out}: {error.strerror}") from None
    return out


def render(runs: Sequence[RunData]) -> str:
    """The page's text."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [_HEAD.format(title=html.escape(f"moetrain: {title}")), f"<h1>{html.escape(title)}</h1>"]
    if len(runs) == 1:
        parts.append(f'<p class="muted">{html.escape(str(runs[0].path))}</p>')
    parts += [_note(f"{run.name}: {note}") for run in runs for note in run.notes]
    parts.append(_table(headline(runs)))
    if domains := domain_table(runs):
        parts += ["<h2>Validation by domain</h2>", _table(domains)]
    if len(runs) > 1 and (differences := config_differences(runs)):
        parts += ["<h2>What differs</h2>", _table(differences)]
    parts += _plots(runs)
    if any(run.samples for run in runs):
        parts.append("<h2>Samples</h2>")
        parts += [_samples(run, named=len(runs) > 1) for run in runs if run.samples]
    parts.append("<h2>Settings</h2>")
    parts += [_settings(run, named=len(runs) > 1) for run in runs]
    return "\n".join(parts) + "\n</body>\n</html>\n"


def _plots(runs: Sequence[RunData]) -> Iterator[str]:
    yield "<h2>Training</h2>"
    if not any(run.columns or run.loads for run in runs):
        yield '<p class="muted">Nothing to plot yet.</p>'
        return
    if not has_matplotlib():
        yield _note(f"{MISSING}, then run moetrain report on the same folder.")
        return
    with style():
        yield _grid(_training_plots(runs))
        if any(run.layers("max_load") for run in runs):
            yield "<h2>Routing</h2>"
            yield _grid(_routing_plots(runs))
        if any(run.layers("dead_experts") for run in runs) and curves.never_dead(runs):
            yield '<p class="muted">No expert was without a token at any recorded step.</p>'
        mapped = [run for run in runs if run.loads is not None]
        for run in mapped[:MAX_MAPS]:
            yield f"<h2>Expert load{': ' + html.escape(run.name) if len(runs) > 1 else ''}</h2>"
            yield _grid(_load_plots(run))
        if len(mapped) > MAX_MAPS:
            yield _note(f"Load maps are drawn for the first {MAX_MAPS} of {len(mapped)} runs.")


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


def _grid(plots: Sequence[tuple[str, Callable[[], Plot | None]]]) -> str:
    figures = []
    for name, draw in plots:
        try:
            plot = draw()
        except Exception as error:  # one odd file must not cost the reader the rest of the report
            figures.append(_note(f"The plot of {name} could not be drawn: {type(error).__name__}: {error}"))
            continue
        if plot is not None:
            caption = f"<figcaption>{html.escape(plot.caption)}</figcaption>" if plot.caption else ""
            wide = ' class="wide"' if plot.wide else ""
            figures.append(f"<figure{wide}>{plot.image}{caption}</figure>")
    return '<div class="plots">\n' + "\n".join(figures) + "\n</div>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table[0])
    body = "\n".join(
        f"<tr><th>{html.escape(row[0])}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in table[1:]
    )
    head = f"<thead><tr>{head}</tr></thead>"
    return f'<div class="scroll"><table>\n{head}\n<tbody>\n{body}\n</tbody></table></div>'


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _samples(run: RunData, named: bool) -> str:
    """The newest sample open, the earlier ones folded."""
    parts = []
    for i, (name, text) in enumerate(reversed(run.samples[-MAX_SAMPLES:])):
        cut = " (cut)" if len(text) > MAX_CHARACTERS else ""
        title = html.escape(f"{run.name}: {name}{cut}" if named else f"{name}{cut}")
        parts.append(
            f"<details{' open' if i == 0 else ''}><summary>{title}</summary>"
            f'<pre class="sample">\n{html.escape(text[:MAX_CHARACTERS])}</pre></details>'
        )
    if len(run.samples) > MAX_SAMPLES:
        parts.append(f'<p class="muted">The newest {MAX_SAMPLES} of {len(run.samples)} samples.</p>')
    return "\n".join(parts)


def _settings(run: RunData, named: bool) -> str:
    prefix = f"{run.name}: " if named else ""
    blocks = [
        ("config", run.config_text),
        ("environment", json.dumps(run.environment, indent=2, ensure_ascii=False) if run.environment else ""),
        ("summary", json.dumps(run.summary, indent=2, ensure_ascii=False) if run.summary else ""),
    ]
    return "\n".join(
        f"<details><summary>{html.escape(prefix + name)}</summary><pre>\n{html.escape(text)}</pre></details>"
        for name, text in blocks
        if text
    )
