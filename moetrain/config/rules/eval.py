"""Rules about ``moetrain eval``."""

from __future__ import annotations

from pathlib import Path

from moetrain.config.rules.checks import check_device, is_installed
from moetrain.errors import UserError
from moetrain.evaluation.options import EvalConfig, EvalData


def eval_device(cfg: EvalConfig) -> None:
    check_device("device", cfg.device)


def eval_has_something_to_score(cfg: EvalConfig) -> None:
    if cfg.data.path is None and not cfg.tasks:
        raise UserError("give text to score (data.path=FILES), tasks of lm-eval (tasks=[...]), or both")


def eval_options_are_used(cfg: EvalConfig) -> None:
    """A value that nothing reads would seem to have an effect."""
    for name in ("include_path", "num_fewshot", "limit"):
        value = getattr(cfg, name)
        if value is not None and not cfg.tasks:
            raise UserError(f"{name}={value} is of tasks, but tasks=[]: leave it out, or name tasks")
    for name in ("format", "text_key"):
        value, default = (getattr(data, name) for data in (cfg.data, EvalData()))
        if value != default and cfg.data.path is None:
            shown = getattr(value, "name", value)
            raise UserError(f"data.{name}={shown} is of files, but data.path is not set: leave it out")


def eval_text_exists(cfg: EvalConfig) -> None:
    from moetrain.data.sources.local import find_files

    if cfg.data.path is not None:
        find_files(cfg.data.path)


def eval_tasks_can_be_read(cfg: EvalConfig) -> None:
    if cfg.tasks and not is_installed("lm_eval"):
        raise UserError(
            f"tasks=[{','.join(cfg.tasks)}] needs the package lm-eval, which is not installed: "
            "pip install 'moetrain[eval]', or leave tasks out"
        )
    if cfg.include_path is not None and not Path(cfg.include_path).expanduser().is_dir():
        raise UserError(f"include_path={cfg.include_path} is no folder")


def eval_json_can_be_written(cfg: EvalConfig) -> None:
    if cfg.json is None:
        return
    path = Path(cfg.json).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"cannot be written: there is no folder {path.parent}"
        raise UserError(f"json={cfg.json} {what}")


def eval_checkpoint(cfg: EvalConfig) -> None:
    if not Path(cfg.checkpoint).expanduser().is_dir():
        raise UserError(
            f"checkpoint={cfg.checkpoint} does not exist: give a run folder, one of its checkpoints, "
            "or a folder made by moetrain convert"
        )


RULES = (
    eval_device,
    eval_has_something_to_score,
    eval_options_are_used,
    eval_text_exists,
    eval_tasks_can_be_read,
    eval_json_can_be_written,
    eval_checkpoint,
)
