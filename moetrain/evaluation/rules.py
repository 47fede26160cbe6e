"""What ``moetrain eval`` refuses of its settings."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from moetrain.bounds import check_ranges
from moetrain.data.rules import check_rows, refuse_unread
from moetrain.data.sources.paths import find_files
from moetrain.errors import UserError
from moetrain.evaluation.options import EvalConfig, EvalData, TextKind
from moetrain.packages import is_installed
from moetrain.train.replay import check_replay
from moetrain.train.rules import check_device


def check_eval(cfg: EvalConfig) -> None:
    """Raise UserError for the first setting that is out of its range, or does not fit."""
    check_ranges(cfg)
    check_device("device", cfg.device)
    if cfg.data.path is None and not cfg.tasks:
        raise UserError("give text to score (data.path=FILES), tasks of lm-eval (tasks=[...]), or both")
    _check_used(cfg)
    _check_rows(cfg.data)
    check_replay(cfg.replay)
    if cfg.data.path is not None:
        find_files(cfg.data.path)
    _check_tasks(cfg)
    _check_json(cfg)
    if not Path(cfg.checkpoint).expanduser().is_dir():
        raise UserError(
            f"checkpoint={cfg.checkpoint} does not exist: give a run folder, one of its checkpoints, "
            "or a folder made by moetrain convert"
        )


def _check_used(cfg: EvalConfig) -> None:
    """A value that nothing reads would seem to have an effect."""
    for name in ("include_path", "num_fewshot", "limit"):
        value = getattr(cfg, name)
        if value is not None and not cfg.tasks:
            raise UserError(f"{name}={value} is of tasks, but tasks=[]: leave it out, or name tasks")
    for name in ("record", "force"):
        value = getattr(cfg.replay, name)
        if value is not None and cfg.data.path is None:
            raise UserError(f"replay.{name}={value} is of files, but data.path is not set: leave it out")
    for name in (each.name for each in fields(EvalData) if each.name != "seq_len"):  # which tasks read too
        value, default = (getattr(data, name) for data in (cfg.data, EvalData()))
        if value != default and cfg.data.path is None:
            shown = getattr(value, "name", value)
            raise UserError(f"data.{name}={shown} is of files, but data.path is not set: leave it out")


def _check_rows(data: EvalData) -> None:
    refuse_unread(data, data.kind.value, "data")
    if data.kind is TextKind.text:
        return
    if data.text_key != EvalData.text_key:
        raise UserError(
            f"data.text_key={data.text_key} is not used by data.kind={data.kind.name}: leave it out"
        )
    check_rows(data, f"data.kind={data.kind.name}", data.format, "data")


def _check_tasks(cfg: EvalConfig) -> None:
    if cfg.tasks and not is_installed("lm_eval"):
        raise UserError(
            f"tasks=[{','.join(cfg.tasks)}] needs the package lm-eval, which is not installed: "
            "pip install 'moetrain[eval]', or leave tasks out"
        )
    if cfg.include_path is not None and not Path(cfg.include_path).expanduser().is_dir():
        raise UserError(f"include_path={cfg.include_path} is no folder")


def _check_json(cfg: EvalConfig) -> None:
    if cfg.json is None:
        return
    path = Path(cfg.json).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"cannot be written: there is no folder {path.parent}"
        raise UserError(f"json={cfg.json} {what}")
