"""The parts of a run, from config to live objects whose weights are drawn or loaded."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.data import Corpus, TrainLoader, prepare
from moetrain.errors import UserError
from moetrain.models.count import flops_breakdown
from moetrain.parallel.distributed import (
    is_main,
    new_gloo_group,
    rank,
    world,
)
from moetrain.parallel.watchdog.flight_recorder import patiently
from moetrain.train.alarms.build import build_alarms
from moetrain.train.assemble import assemble
from moetrain.train.initial import load_initial
from moetrain.train.log.monitor import ThroughputMeter
from moetrain.train.options import TrainConfig
from moetrain.train.replay import open_replay
from moetrain.train.rules import check_batch, check_loop
from moetrain.train.run_files import ReadConfig
from moetrain.train.state import TrainState
from moetrain.train.step import TrainStep

_PATIENCE = timedelta(days=7)  # of ranks that wait for one that tokenises


@dataclass(frozen=True)
class Built:
    """A run's parts, from config to live objects."""

    corpus: Corpus
    state: TrainState
    step: TrainStep
    summary: dict[str, Any]


def start(
    cfg: TrainConfig,
    device: str,
    checkpointer: Checkpointer,
    resume_from: Path | None,
    read: ReadConfig,
) -> Built:
    """All that a step needs, with the weights of ``resume_from``, of ``cfg.init_from``, or drawn anew."""
    built = build(cfg, device, drawn=resume_from is None and cfg.init_from is None)
    state = built.state
    if resume_from is not None:
        with patiently("loading a checkpoint"):
            state.load(checkpointer, resume_from)
        if cfg.resume != "auto":  # else the next resume=auto would jump back to the steps left behind
            checkpointer.set_aside_after(state.step)
    elif cfg.init_from is not None:
        path, engine = Path(cfg.init_from).expanduser(), state.engine
        model, optimizer = engine.model_tensors(), engine.optimizer_tensors() if cfg.init_optimizer else {}
        with patiently("loading the first weights"):
            load_initial(path, model, optimizer, built.corpus.tokenizer, read, cfg.train.seed)
        engine.take(model | optimizer)
    return built


def build(cfg: TrainConfig, device: str, drawn: bool = True) -> Built:
    """Data, model, layout, optimizer, losses and controllers. Rank 0 prepares the data, the others wait.

    If ``drawn`` is false, weights are undefined until they are loaded.
    """
    check_loop(cfg.train)
    check_batch(cfg.train, cfg.data.seq_len, world())
    corpus = _prepare_in_turn(cfg)
    vocab_size = _vocab_size(cfg, corpus)
    made = assemble(cfg, vocab_size, device, world(), drawn=drawn)
    made.step.replay = open_replay(cfg.replay, made.task.model.routers(), is_main())
    sequences = cfg.train.global_batch_tokens // cfg.data.seq_len
    data = made.engine.data
    batch_rank, batch_ranks = rank(data.batch), world(data.batch)
    loader = TrainLoader(
        corpus.train, corpus.order, cfg.train.micro_batch_size, sequences, batch_rank, batch_ranks
    )
    flops = flops_breakdown(cfg.model, cfg.router, cfg.data.seq_len, vocab_size, cfg.experts)
    alarms = build_alarms(cfg, made.task.model, flops)
    state = TrainState(made.engine, made.controllers, loader, made.monitor, ThroughputMeter(), alarms=alarms)
    summary = {
        "params_total": made.counts.total,
        "params_active": made.counts.active,
        "flops_per_token": flops.forward,
        "vocab_size": vocab_size,
        "train_tokens": corpus.train.num_tokens,
        "val_tokens": corpus.val.num_tokens,
    }
    return Built(corpus, state, made.step, summary)


def _prepare_in_turn(cfg: TrainConfig) -> Corpus:
    """Rank 0 first, then the others, which on other machines may have it all to do again.

    Waiting takes as long as it takes: tokenising may be slower than any collective's time-out. A rank that
    dies is noticed by its closed connections, one that falls silent by the watchdog.
    """
    if world() == 1:
        return prepare(cfg.data, cfg.train.seed)
    patient = new_gloo_group(_PATIENCE)
    with patiently("preparing the data"):
        corpus = prepare(cfg.data, cfg.train.seed) if is_main() else None
        dist.barrier(patient)
        corpus = corpus or prepare(cfg.data, cfg.train.seed)
        dist.barrier(patient)
    dist.destroy_process_group(patient)
    return corpus


def _vocab_size(cfg: TrainConfig, corpus: Corpus) -> int:
    needed = corpus.tokenizer.vocab_size
    if cfg.model.vocab_size is not None and cfg.model.vocab_size < needed:
        raise UserError(
            f"model.vocab_size={cfg.model.vocab_size} is smaller than the tokenizer's {needed}: "
            "raise it, or set model.vocab_size=null; where init_from decides it, moetrain convert that model "
            "first, which leaves out added special tokens that have no embedding"
        )
    return cfg.model.vocab_size or needed
