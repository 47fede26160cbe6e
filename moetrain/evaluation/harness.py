"""Tasks of EleutherAI's lm-eval on a model of ours, through its Python API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from moetrain.data import Tokenizer
from moetrain.errors import UserError
from moetrain.evaluation.lm import DecoderLM
from moetrain.evaluation.options import EvalConfig
from moetrain.nearest import near_miss
from moetrain.train.task import NextToken


def score_tasks(cfg: EvalConfig, task: NextToken, tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """lm-eval's results: task -> "metric,filter" -> value. Its seeds and defaults are its own.

    Raises UserError for a task that is not known, and for one whose data cannot be read.
    """
    folder = None if cfg.include_path is None else str(Path(cfg.include_path).expanduser())
    manager = TaskManager(include_path=folder)
    for name in cfg.tasks:
        if name not in manager.all_tasks:
            close = near_miss(name, manager.all_tasks)
            hint = f" (did you mean {close}?)" if close else ""
            raise UserError(
                f"tasks: {name} is not known to lm-eval{hint}; tasks of your own need include_path=FOLDER"
            )
    lm = DecoderLM(task, tokenizer, max_length, cfg.batch_size)
    try:
        found = simple_evaluate(
            model=lm,
            tasks=list(cfg.tasks),
            num_fewshot=cfg.num_fewshot,
            limit=cfg.limit,
            task_manager=manager,
            log_samples=False,
        )
    except (OSError, DatasetsError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"tasks=[{','.join(cfg.tasks)}]: their data cannot be read: {lines[0]}") from error
    results: dict[str, Any] = found["results"]
    return results
