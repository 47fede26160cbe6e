"""From a config to the live parts of a training step; ``moetrain verify`` proves exactly what this builds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moetrain.errors import UserError
from moetrain.models.attention import require_backend
from moetrain.models.count import Counts, count_parameters
from moetrain.models.decoder import Decoder
from moetrain.moe.balance import Controller, build_controllers, make_terms
from moetrain.ops.init import on_meta_device
from moetrain.parallel.apply import parallelize
from moetrain.parallel.materialize import allocate, draw
from moetrain.parallel.mesh import DataGroups, build_meshes
from moetrain.parallel.watchdog.flight_recorder import observe, watched
from moetrain.train.log.monitor import LossMonitor
from moetrain.train.optim.build import build_optimizer, freeze
from moetrain.train.options import Precision, Residual, TrainConfig
from moetrain.train.step import TrainStep
from moetrain.train.task import NextToken

_PRODUCTS = {
    Precision.fp32: torch.float32,
    Precision.fp64: torch.float64,
    Precision.bf16: torch.bfloat16,
}


@dataclass(frozen=True)
class Assembled:
    """A step and what it acts on; ``counts`` are of the whole model, on whatever ranks it lies."""

    task: NextToken
    optimizer: torch.optim.Optimizer
    controllers: list[Controller]
    monitor: LossMonitor
    step: TrainStep
    counts: Counts
    data: DataGroups


def assemble(
    cfg: TrainConfig,
    vocab_size: int,
    device: str,
    world: int,
    adjust: Callable[[Decoder], None] = lambda model: None,
    drawn: bool = True,
) -> Assembled:
    """Model, layout over ``world`` ranks, optimizer, losses and controllers.

    Each rank allocates and draws its own shards. ``adjust`` may change how parameters start, alike on every
    rank; not ``drawn``: they are about to be loaded, and are undefined until then.
    Raises UserError where the model or the layout cannot be built, or attention not computed as asked.
    """
    task, counts, data = lay_out(cfg, vocab_size, device, world, adjust)
    allocate(task, device)
    if drawn:
        draw(task, cfg.train.seed)
    return with_step(cfg, task, counts, data)


def lay_out(
    cfg: TrainConfig,
    vocab_size: int,
    device: str,
    world: int,
    adjust: Callable[[Decoder], None] = lambda model: None,
) -> tuple[NextToken, Counts, DataGroups]:
    """The task, laid out over ``world`` ranks, without memory; the whole model's counts; who reads what."""
    require_backend(cfg.model, cfg.data.seq_len, _PRODUCTS[cfg.train.precision], _current(device))
    torch.manual_seed(cfg.train.seed)  # of what a plugin's router draws by itself, whole on every rank
    try:
        with on_meta_device():
            model = Decoder(cfg.model, cfg.router, cfg.experts, vocab_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    if cfg.train.precision is Precision.fp64:
        model = model.double()
    compute_dtype = torch.bfloat16 if cfg.train.precision is Precision.bf16 else None
    model.compute_dtype = compute_dtype
    if compute_dtype is not None and cfg.train.residual is Residual.fp32:
        model.residual_dtype = torch.float32
    adjust(model)
    freeze(model, cfg.optim.frozen)
    counts = count_parameters(model)
    task = NextToken(model)
    with watched("the process groups of the layout", ""):
        meshes = build_meshes(cfg.parallel, world, device)
    parallelize(
        task, meshes, cfg.train.recompute, cfg.train.compile, observer=observe, compute_dtype=compute_dtype
    )
    return task, counts, meshes.data


def with_step(
    cfg: TrainConfig,
    task: NextToken,
    counts: Counts,
    data: DataGroups,
    make_step: Callable[..., TrainStep] = TrainStep,
) -> Assembled:
    """Optimizer, losses, controllers and a step of a task in memory; ``make_step`` is called as TrainStep."""
    optimizer = build_optimizer(task, cfg.optim)
    terms = make_terms(cfg.balance.losses)
    controllers = build_controllers(cfg.balance.controllers, terms, task.model.routers())
    monitor = LossMonitor(cfg.train.spike_factor)
    step = make_step(
        task, optimizer, terms, controllers, monitor, cfg.optim.clip_norm, cfg.train.seed, data.loss
    )
    return Assembled(task, optimizer, controllers, monitor, step, counts, data)


def _current(device: str) -> torch.device:
    """This rank's, by its number as tensors on it have it."""
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
