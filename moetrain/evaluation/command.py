"""``moetrain eval``: score files and tasks with a stored model, print tables, write the figures as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from moetrain.convert.open_model import StoredModel, open_model
from moetrain.data.options import DataConfig
from moetrain.errors import UserError
from moetrain.evaluation.files import Scores, figures_of, read_otherwise, score_files
from moetrain.evaluation.options import EvalConfig
from moetrain.evaluation.rules import check_eval
from moetrain.parallel.precision import round_for_inference
from moetrain.terminal import console, show
from moetrain.train.log.metrics import EvalSums
from moetrain.train.options import Precision
from moetrain.train.run import resolve_device
from moetrain.train.run_files import ReadTrained
from moetrain.train.task import NextToken
from moetrain.writing import write_atomic

Figures = dict[str, Any]


def eval_app(cfg: EvalConfig, read: ReadTrained) -> int:
    """The exit code. Raises UserError for a model or a text that cannot be read; writes nothing then."""
    check_eval(cfg)
    stored = open_model(Path(cfg.checkpoint).expanduser(), read)
    data = _data_of(stored, cfg.data.seq_len)
    model = stored.build(cfg.precision is Precision.fp64, resolve_device(cfg.device))
    if cfg.precision is Precision.bf16:
        round_for_inference(model, torch.bfloat16)
    task = NextToken(model)
    figures: Figures = {"checkpoint": str(stored.path), "seq_len": data.seq_len}
    tables: list[Table] = []
    notes: list[str] = []
    if cfg.data.path is not None:
        scores = score_files(cfg, stored, task, data)
        figures |= scores.figures()
        tables += _score_tables(scores)
        notes += read_otherwise(cfg.data, data)
        if scores.conversations is not None:
            notes.append(str(scores.conversations))
    if cfg.tasks:
        from moetrain.evaluation.harness import score_tasks

        figures["tasks"] = score_tasks(cfg, task, stored.tokenizer, data.seq_len)
        tables.append(_tasks_table(figures["tasks"]))
    if cfg.json is not None:
        write_atomic(Path(cfg.json).expanduser(), json.dumps(_strict(figures), indent=1) + "\n")
    show(f"{stored.path}, windows of {data.seq_len} tokens")
    for line in notes:
        show(line)
    for table in tables:
        console().print(table)
    return 0


def _data_of(stored: StoredModel, seq_len: int | None) -> DataConfig:
    """How documents become sequences: as in training, but windows of ``seq_len`` where that is set."""
    if stored.trained is not None:
        data = stored.trained.data
        return data if seq_len is None else replace(data, seq_len=seq_len)
    if seq_len is None:
        raise UserError(f"{stored.path} is no run and tells no length of windows: give data.seq_len=...")
    return DataConfig(seq_len=seq_len)


def _score_tables(scores: Scores) -> list[Table]:
    """By file, and by domain where there are such; the sums of all stand in the first."""
    return [
        _sums_table(head, list(rows.items()), scores.total if number == 0 else None)
        for number, (head, rows) in enumerate((("file", scores.files), ("domain", scores.domains)))
        if rows
    ]


def _sums_table(head: str, rows: list[tuple[str, EvalSums]], total: EvalSums | None) -> Table:
    table = Table(box=None)
    table.add_column(head, overflow="fold")
    for name in ("tokens", "bytes", "loss", "perplexity", "bits per byte"):
        table.add_column(name, justify="right")
    for name, sums in [*rows, ("all", total)] if total is not None and len(rows) > 1 else rows:
        table.add_row(name, *(_shown(value) for value in figures_of(sums).values()))
    return table


def _tasks_table(results: Figures) -> Table:
    table = Table("task", "metric", box=None)
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    for name, metrics in results.items():
        for metric, value in metrics.items():
            error = metrics.get(metric.replace(",", "_stderr,", 1))
            if isinstance(value, (int, float)) and "_stderr," not in metric:
                table.add_row(name, metric.removesuffix(",none"), _shown(value), _shown(error))
    return table


def _shown(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) and math.isfinite(value) else "-"


def _strict(value: Any) -> Any:
    """What JSON has no word for (NaN, infinity) as null."""
    if isinstance(value, dict):
        return {str(key): _strict(part) for key, part in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
