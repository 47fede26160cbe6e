"""``moetrain eval``: loss of files, and tasks of lm-eval."""

from __future__ import annotations

from moetrain.commands.composed import composed, refuse_ranks
from moetrain.config.validate import validate_eval
from moetrain.evaluation.options import EvalConfig


def run(args: list[str]) -> int:
    cfg = composed("eval", EvalConfig, args)
    if cfg is None:
        return 0
    refuse_ranks("eval", "runs in one process")
    validate_eval(cfg)
    from moetrain.config.stored import trained_config
    from moetrain.evaluation.command import eval_app

    return eval_app(cfg, trained_config)
