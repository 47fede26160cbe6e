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
from moetrain.data import Packing, val_batches, whole_files
from moetrain.data.options import DataConfig
from moetrain.data.sources.local import find_files
from moetrain.errors import UserError
from moetrain.evaluation.options import EvalConfig
from moetrain.evaluation.rules import check_eval
from moetrain.parallel.precision import round_for_inference
from moetrain.terminal import console, show
from moetrain.train.evaluate import evaluate
from moetrain.train.log.metrics import EvalSums
from moetrain.train.options import Precision
from moetrain.train.replay import open_replay
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
    tables = []
    if cfg.data.path is not None:
        total, of_files = _score_files(cfg, stored, task, data)
        figures |= {"total": total, "files": of_files}
        tables.append(_files_table(total, of_files))
    if cfg.tasks:
        from moetrain.evaluation.harness import score_tasks

        figures["tasks"] = score_tasks(cfg, task, stored.tokenizer, data.seq_len)
        tables.append(_tasks_table(figures["tasks"]))
    if cfg.json is not None:
        write_atomic(Path(cfg.json).expanduser(), json.dumps(_strict(figures), indent=1) + "\n")
    show(f"{stored.path}, windows of {data.seq_len} tokens")
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


def _score_files(
    cfg: EvalConfig, stored: StoredModel, task: NextToken, data: DataConfig
) -> tuple[Figures, dict[str, Figures]]:
    """(all files, each file)."""
    assert cfg.data.path is not None
    packing = Packing(
        seq_len=data.seq_len,
        eos_id=stored.tokenizer.eos_id,
        keep_documents=not data.cross_document_attention,
        reset_positions=data.reset_positions,
        pad_last=True,
    )
    files = find_files(cfg.data.path)
    split = whole_files(files, cfg.data.format, cfg.data.text_key, stored.tokenizer, packing)
    names = [str(file) for file in files]
    batches = val_batches(split, cfg.batch_size)
    replay = open_replay(cfg.replay, task.model.routers())
    total, of_files = evaluate(task, batches, names, seed=0, byte_scale=split.byte_scale, replay=replay)
    nothing = EvalSums(0.0, 0, 0)
    return _figures(total), {name: _figures(of_files.get(name, nothing)) for name in names}


def _figures(sums: EvalSums) -> Figures:
    return {
        "tokens": sums.tokens,
        "bytes": sums.bytes,
        "loss": sums.loss,
        "perplexity": sums.perplexity,
        "bits_per_byte": sums.bits_per_byte,
    }


def _files_table(total: Figures, of_files: dict[str, Figures]) -> Table:
    table = Table(box=None)
    table.add_column("file", overflow="fold")
    for head in ("tokens", "bytes", "loss", "perplexity", "bits per byte"):
        table.add_column(head, justify="right")
    rows = [*of_files.items(), ("all", total)] if len(of_files) > 1 else list(of_files.items())
    for name, figures in rows:
        table.add_row(name, *(_shown(value) for value in figures.values()))
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
