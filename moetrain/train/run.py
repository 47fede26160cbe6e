"""``moetrain train``: build everything that a config names, train, and leave a finished run folder."""

from __future__ import annotations

import json
import logging
import math
import platform
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.peers import from_rank_0
from moetrain.data import val_batches
from moetrain.errors import write_error_file
from moetrain.parallel.allocator import keep_freed_memory
from moetrain.parallel.cores import threads_per_rank
from moetrain.parallel.distributed import (
    init_from_env,
    is_main,
    local_world,
    rank,
    shutdown,
    world,
)
from moetrain.parallel.watchdog.flight_recorder import at, patiently
from moetrain.parallel.watchdog.rank_file import RankFile
from moetrain.parallel.watchdog.watchdog import backend_timeout, watching
from moetrain.plain import plain, to_yaml
from moetrain.terminal import tell
from moetrain.train.evaluate import evaluate, other_modes, routing_by
from moetrain.train.identity import identity_of
from moetrain.train.initial import carry_over
from moetrain.train.log.diagnostics import RoutingDiagnostics
from moetrain.train.log.jsonl import last_row
from moetrain.train.log.metrics import EvalSums, eval_row
from moetrain.train.log.progress import build_progress
from moetrain.train.log.trackers import build_tracker
from moetrain.train.loop import Loop, RunServices
from moetrain.train.options import TrainConfig
from moetrain.train.resume import check_resume, run_folder
from moetrain.train.run_dir import RunDir, new_folder
from moetrain.train.run_files import TOKENIZER, ReadConfig
from moetrain.train.run_lock import FolderLock, owning
from moetrain.train.sample import write_sample
from moetrain.train.start import Built, start
from moetrain.train.stopping import StopFlag
from moetrain.writing import write_atomic

_SUMMARY = "summary.json"


def train(cfg: TrainConfig, read: ReadConfig, notes: Sequence[str] = ()) -> bool:
    """Train as ``cfg`` says. True where all steps are made, False where it was asked to stop; on all ranks.

    ``cfg`` was validated for the ranks of this start, as :mod:`moetrain.config.checked` does; ``notes`` are
    said at the start: its warnings, and what else the caller knows. ``read`` reads the config of the run that
    is resumed, or of ``init_from``. Raises UserError for what the user can mend.
    """
    device = resolve_device(cfg.train.device)
    joined = dist.is_initialized()  # a comparison joins once, for all its runs
    init_from_env(backend_timeout(cfg.parallel.timeout), device)
    _set_up_logging()
    try:
        at("starting")
        with (
            watching(cfg.parallel.timeout),
            owning(*run_path(cfg)) as lock,
            RankFile(lock.folder, rank(), world()) as beats,
        ):
            return _train(cfg, device, read, notes, lock, beats)
    finally:
        if not joined:
            shutdown()


def _train(
    cfg: TrainConfig, device: str, read: ReadConfig, notes: Sequence[str], lock: FolderLock, beats: RankFile
) -> bool:
    started = time.monotonic()
    _set_up_torch(cfg, device)
    run_dir = RunDir(lock.folder, rank())
    keep, in_background = cfg.checkpoint.keep_last, cfg.checkpoint.async_save
    with patiently("looking for a checkpoint"):
        checkpointer = Checkpointer(run_dir.checkpoints, keep, in_background, guard=lock.check)
        resume_from = checkpointer.resolve(cfg.resume)
        told = [*notes, *check_resume(cfg, resume_from, read)]
    built = start(cfg, device, checkpointer, resume_from, read)
    state = built.state
    beats.speed = lambda: state.meter.speed
    if resume_from is None and cfg.init_from is not None and is_main():
        carry_over(Path(cfg.init_from).expanduser(), run_dir.path)
    run_dir.truncate_after(-1 if resume_from is None else state.step)  # row 0 may be of other weights
    run_dir.write_config(to_yaml(cfg))
    environment = run_dir.write_environment(cfg.train.seed, world())
    if is_main():
        (run_dir.path / _SUMMARY).unlink(missing_ok=True)  # of an earlier stop
        built.corpus.tokenizer.save(run_dir.path / TOKENIZER)
        state.identity = identity_of(cfg, run_dir.path)
    tracker = build_tracker(cfg.tracker, rank())
    described = {"counts": built.summary, "environment": environment}
    tracker.start(run_dir.path, plain(cfg) | described, state.step)
    ok = False
    try:
        with (
            build_progress(cfg.train.steps, state.step, rank()) as progress,
            StopFlag(run_dir.stop_file) as stop,
        ):
            for line in [*told, *_opening_lines(cfg, run_dir, built, resume_from)]:
                progress.say(line)
            services = RunServices(run_dir, checkpointer, tracker, progress, stop)
            score = partial(_evaluate, cfg, built)
            loop = Loop(state, built.step, score, services, cfg.train, cfg.checkpoint, cfg.schedule)
            finished = loop.run()
        ok = True
        if not finished:
            beats.stopped(f"stopped after step {state.step} ({stop.reason})")
        _close(cfg, run_dir, built, finished, stop.reason, time.monotonic() - started)
    finally:
        tracker.finish(ok)
        state.loader.close()
        run_dir.close()
    return finished


def _evaluate(cfg: TrainConfig, built: Built) -> dict[str, Any]:
    """The row of an evaluation: by the routers' default way, and the loss alone by any other they have."""
    corpus, state, data = built.corpus, built.state, built.state.engine.data

    def scored(diagnostics: RoutingDiagnostics | None = None) -> tuple[EvalSums, dict[str, EvalSums]]:
        batch_rank, batch_ranks = rank(data.batch), world(data.batch)
        batches = val_batches(
            corpus.val, cfg.train.micro_batch_size, cfg.train.eval_samples, batch_rank, batch_ranks
        )
        with state.engine.forward_only():
            return evaluate(
                state.task,
                batches,
                corpus.domains,
                cfg.train.seed,
                corpus.val.byte_scale,
                data.loss,
                diagnostics=diagnostics,
            )

    diagnostics = RoutingDiagnostics()
    total, domains = scored(diagnostics)
    modes = {}
    for mode in other_modes(state.task.model):
        with routing_by(state.task.model, mode):
            modes[mode], _ = scored()
    routing = diagnostics.row(state.task.model.routers(), data.loss)
    return eval_row(state.step, state.tokens, total, domains, modes, routing)


def run_path(cfg: TrainConfig) -> tuple[Path, list[Path]]:
    """The run's folder, the same on all ranks, and what was made of it: all of one that the clock names."""
    if (folder := run_folder(cfg)) is not None:
        return folder, []
    return from_rank_0(partial(new_folder, Path(cfg.run.root)), "making the run folder")


def resolve_device(device: str) -> str:
    """cpu or cuda; ``auto`` takes a GPU where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _set_up_logging() -> None:
    """What takes long or went wrong is said on stderr, by rank 0."""
    logging.getLogger("moetrain").setLevel(logging.INFO if is_main() else logging.ERROR)


def _set_up_torch(cfg: TrainConfig, device: str) -> None:
    if device == "cpu":
        keep_freed_memory()
        torch.set_num_threads(cfg.train.threads or threads_per_rank(local_world()))
    torch.use_deterministic_algorithms(cfg.train.deterministic)


def _opening_lines(cfg: TrainConfig, run_dir: RunDir, built: Built, resumed: Path | None) -> list[str]:
    s = built.summary
    machine = platform.processor() or platform.machine()
    where = f"{world()} process(es) on {machine}, {cfg.train.precision.value}"
    lines = [
        f"run folder {run_dir.path}  ({where})",
        f"{s['params_total'] / 1e6:.2f} M parameters, {s['params_active'] / 1e6:.2f} M active per token; "
        f"{s['train_tokens'] / 1e6:.2f} M training tokens, vocabulary {s['vocab_size']}",
    ]
    if resumed is not None:
        lines.append(f"resuming from {resumed}: {built.state.step} steps done")
    elif cfg.init_from is not None:
        lines.append(f"starting from the weights of {cfg.init_from}")
    return lines


def _close(
    cfg: TrainConfig, run_dir: RunDir, built: Built, finished: bool, reason: str | None, seconds: float
) -> None:
    """The sample, the summary, the report, and a last line that says what to do next."""
    from moetrain.report import write_report

    state = built.state
    if not finished:
        named = cfg.run.dir is not None or cfg.run.name is not None
        again = "the same command" if named else f"the same command with run.dir={run_dir.path}"
        saved = f"stopped after step {state.step} ({reason}); saved {run_dir.checkpoints}"
        line = f"{saved}; {again} goes on from there"
        write_error_file(line)  # an exit code that is not 0 is a failure to torchrun, whose report shows this
        if is_main():
            _write_summary(run_dir, built, seconds, {"finished": False, "reason": reason})
            tell(line)
        return
    at("the sample at the end")
    text = write_sample(state.engine, built.corpus.tokenizer, cfg.train, run_dir, state.step)
    if not is_main():
        return
    last = last_row(run_dir.metrics.path, "val/loss") or {}
    figures = {key: last.get(key) for key in ("val/loss", "val/perplexity", "val/bits_per_byte")}
    _write_summary(run_dir, built, seconds, {"finished": True, **figures})
    report = write_report([run_dir.path], run_dir.report_file)
    loss, bits = (math.nan if figures[k] is None else figures[k] for k in ("val/loss", "val/bits_per_byte"))
    tell(f"\nsample:\n{text}\n")
    tell(f"validation: loss {loss:.4f}, {bits:.4f} bits per byte")
    tell(f"report: {report}")
    tell(f"write more: moetrain generate checkpoint={run_dir.path} prompt='def '")


def _write_summary(run_dir: RunDir, built: Built, seconds: float, outcome: dict[str, Any]) -> None:
    state = built.state
    spent = state.meter.seconds
    summary = built.summary | {
        **outcome,
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": round(spent, 1),
        "tokens_per_second": round(state.tokens / spent, 1) if spent else None,
        "wall_seconds": round(seconds, 1),
    }
    write_atomic(run_dir.path / _SUMMARY, json.dumps(summary, indent=1) + "\n")
