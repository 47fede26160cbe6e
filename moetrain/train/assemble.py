"""From a config to the live parts of a training step; ``moetrain verify`` proves exactly what this builds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moetrain.errors import UserError
from moetrain.models.attention import require_backend
from moetrain.models.count import Counts, count_parameters
from moetrain.models.decoder import Decoder
from moetrain.moe.balance import Controller, build_controllers, chosen_controllers, make_terms
from moetrain.moe.balance.rules import controllers_refusal, losses_refusal
from moetrain.ops.init import on_meta_device
from moetrain.train.engine import Engine, engine_of
from moetrain.train.log.monitor import LossMonitor
from moetrain.train.optim.build import freeze
from moetrain.train.options import Precision, Residual, TrainConfig
from moetrain.train.step import TrainStep
from moetrain.train.task import Task, task_of

_PRODUCTS = {
    Precision.fp32: torch.float32,
    Precision.fp64: torch.float64,
    Precision.bf16: torch.bfloat16,
}


@dataclass(frozen=True)
class Assembled:
    """A step and what it acts on; ``counts`` are of the whole model, on whatever ranks it lies."""

    engine: Engine
    controllers: list[Controller]
    monitor: LossMonitor
    step: TrainStep
    counts: Counts

    @property
    def task(self) -> Task:
        return self.engine.task


def assemble(
    cfg: TrainConfig,
    vocab_size: int,
    device: str,
    world: int,
    adjust: Callable[[Decoder], None] = lambda model: None,
    drawn: bool = True,
) -> Assembled:
    """Model, layout over ``world`` ranks, optimizer, losses and controllers.

    ``adjust`` may change the initializers of parameters, in the same way on every rank. If ``drawn`` is
    false, parameters are undefined until they are loaded. Raises UserError if the model or the layout cannot
    be built, or if the attention backend of the config cannot compute the model's attention.
    """
    task, counts = build_task(cfg, vocab_size, device, adjust)
    return with_step(cfg, engine_of(cfg.engine.name)(task, cfg, device, world, drawn), counts)


def build_task(
    cfg: TrainConfig, vocab_size: int, device: str, adjust: Callable[[Decoder], None] = lambda model: None
) -> tuple[Task, Counts]:
    """The task on the meta device, not laid out over ranks yet, and the counts of its model."""
    require_backend(cfg.model, cfg.data.seq_len, _PRODUCTS[cfg.train.precision], _current(device))
    torch.manual_seed(cfg.train.seed)  # of what a plugin's router draws by itself, whole on every rank
    try:
        with on_meta_device():
            model = Decoder(cfg.model, cfg.router, cfg.experts, vocab_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    if cfg.train.precision is Precision.fp64:
        model = model.double()
    model.compute_dtype = torch.bfloat16 if cfg.train.precision is Precision.bf16 else None
    if model.compute_dtype is not None and cfg.train.residual is Residual.fp32:
        model.residual_dtype = torch.float32
    adjust(model)
    freeze(model, cfg.optim.frozen)
    make_task = task_of(cfg.train.task)
    try:
        task = make_task(model)
    except ValueError as error:
        raise UserError(f"train.task={cfg.train.task}: {error}") from None
    return task, count_parameters(model)


def with_step(
    cfg: TrainConfig, engine: Engine, counts: Counts, make_step: Callable[..., TrainStep] = TrainStep
) -> Assembled:
    """Losses, controllers and a step of an engine; ``make_step`` is called as TrainStep."""
    terms = make_terms(cfg.balance.losses)
    routers = engine.task.model.routers()
    for router in routers.values():
        if line := losses_refusal(terms, router):
            raise UserError(line)
    chosen = chosen_controllers(cfg.balance.controllers, terms)
    if line := controllers_refusal(chosen, list(routers.values())):
        raise UserError(line)
    controllers = build_controllers(cfg.balance.controllers, terms, routers)
    monitor = LossMonitor(cfg.train.spike_factor)
    step = make_step(
        engine,
        terms,
        controllers,
        monitor,
        cfg.optim.clip_norm,
        cfg.train.seed,
        engine.data.loss,
        cfg.train.future,
    )
    return Assembled(engine, controllers, monitor, step, counts)


def _current(device: str) -> torch.device:
    """This rank's, by its number as tensors on it have it."""
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
