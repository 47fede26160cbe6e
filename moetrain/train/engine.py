"""Engines lay a task out over the ranks and update its weights: the interface, and the native engine.

A step is one forward and one backward per micro-batch, then ``clip``, then ``update`` or not, then
``drop_gradients``. The caller does not depend on the layout of weights, gradients and optimizer state.

The gradient rule: gradients are summed over micro-batches and ranks, never averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from moetrain.checkpoint.state_dict import model_tensors, optimizer_tensors, take_optimizer_tensors
from moetrain.errors import UserError
from moetrain.ops.local_part import local_part
from moetrain.parallel.apply import parallelize, reshard, sync_gradients
from moetrain.parallel.clip import clip_, global_norm
from moetrain.parallel.materialize import allocate, draw
from moetrain.parallel.mesh import DataGroups, Meshes, build_meshes
from moetrain.parallel.watchdog.flight_recorder import observe, watched
from moetrain.train.optim.build import build_optimizer, set_lr
from moetrain.train.options import Precision, TrainConfig
from moetrain.train.task import Task, TaskOutput


class Engine(Protocol):
    """A task that is laid out over the ranks. All ranks call a method together, unless it says otherwise."""

    task: Task
    data: DataGroups  # which ranks read the same batch, and whose tokens add up

    def forward(self, arguments: Mapping[str, object], last: bool) -> TaskOutput:
        """The task's output for a micro-batch; only the ``last`` backward of a step sums over the ranks.

        Every rank must run the same number of micro-batches.
        """

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``, which the last forward gave, to the step's."""

    def clip(self, max_norm: float | None) -> Tensor:
        """The L2 norm of all gradients, fp64, on the device; then they are scaled to at most ``max_norm``.

        None scales nothing. A norm that is not finite leaves the gradients as they are.
        """

    def norm(self, norm_type: float = 2.0) -> Tensor:
        """The norm (2 or inf) of all gradients taken as one vector, fp64, on the device."""

    def gradients(self) -> dict[str, Tensor | None]:
        """Parameter's name in the task -> this rank's part of its gradient. Any rank may ask alone."""

    def placed_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's name and gradient, zeros where it has none, one at a time.

        A DTensor, where this rank holds a part of it.
        """

    def weights(self) -> dict[str, Tensor]:
        """Parameter's name in the task -> this rank's part of it. Any rank may ask alone."""

    def editing(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """A context in which all ranks may write the same values to ``parameters``, between updates."""

    def update(self) -> None:
        """Move the weights by the gradients, at the learning rate that was set."""

    def drop_gradients(self) -> None:
        """Forget the step's gradients. Any rank may do so alone."""

    def set_lr(self, factor: float) -> float:
        """Set every learning rate to ``factor`` times its peak; returns that of the first group."""

    def model_tensors(self) -> dict[str, Tensor]:
        """``model.<name>`` -> live parameter or persistent buffer; a load fills them in place."""

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """``optim.<name>.<key>`` -> the optimizer's state; a load fills it in place, and calls ``take``."""

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from ``tensors``, those of both methods above, which a load has filled."""

    def forward_only(self) -> AbstractContextManager[None]:
        """A context for forward passes without a backward pass; on exit the gathered weights are freed."""

    def gathered(self) -> AbstractContextManager[None]:
        """The same context as ``forward_only``, for direct calls of ``task.model``."""


class NativeEngine:
    """FSDP2 for what every rank computes, ``parallel.ep`` for experts, and an optimizer of torch's kind.

    ``task`` is laid out over the ranks already, or whole; ``data``: the data groups of its layout.
    """

    def __init__(self, task: Task, optimizer: torch.optim.Optimizer, data: DataGroups | None = None) -> None:
        self.task, self.optimizer = task, optimizer
        self.data = DataGroups() if data is None else data

    def forward(self, arguments: Mapping[str, object], last: bool) -> TaskOutput:
        sync_gradients(self.task, last)
        output: TaskOutput = self.task(**arguments)
        return output

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self, max_norm: float | None) -> Tensor:
        return self.norm() if max_norm is None else clip_(list(self.task.parameters()), max_norm)

    def norm(self, norm_type: float = 2.0) -> Tensor:
        return global_norm(list(self.task.parameters()), norm_type)

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: parameter.grad for name, parameter in self.task.named_parameters()}

    def placed_gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.task.named_parameters():
            yield name, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    def weights(self) -> dict[str, Tensor]:
        return {name: local_part(parameter) for name, parameter in self.task.named_parameters()}

    def editing(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()

    def update(self) -> None:
        self.optimizer.step()

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def set_lr(self, factor: float) -> float:
        set_lr(self.optimizer, factor)
        peak: float = self.optimizer.param_groups[0]["peak_lr"]
        return peak * factor

    def model_tensors(self) -> dict[str, Tensor]:
        return model_tensors(self.task.model)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return optimizer_tensors(self.task.model, self.optimizer)

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        take_optimizer_tensors(self.task.model, self.optimizer, tensors)

    @contextmanager
    def forward_only(self) -> Iterator[None]:
        try:
            yield
        finally:
            reshard(self.task)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        with self.forward_only():
            if isinstance(self.task, FSDPModule):
                self.task.unshard()
            yield


def prepare(task: Task, cfg: TrainConfig, device: str, world: int, drawn: bool) -> NativeEngine:
    """Lay ``task``, on the meta device, out over ``world`` ranks; each allocates its own shards.

    Weights are drawn as functions of ``train.seed`` and their names. If ``drawn`` is false, they are
    undefined until they are loaded.
    """
    data = lay_out(task, cfg, device, world)
    allocate(task, device)
    if drawn:
        draw(task, cfg.train.seed)
    return NativeEngine(task, build_optimizer(task, cfg.optim), data)


def lay_out(task: Task, cfg: TrainConfig, device: str, world: int) -> DataGroups:
    """Lay ``task``, on the meta device, out over ``world`` ranks. Returns the groups of ranks by data."""
    with watched("the process groups of the layout", ""):
        meshes = build_meshes(cfg.parallel, world, device)
    spread(task, cfg, meshes)
    return meshes.data


def spread(task: Task, cfg: TrainConfig, meshes: Meshes) -> None:
    """Lay ``task`` out over ``meshes``, as ``train`` says; the watchdog sees what it will exchange."""
    compute_dtype = torch.bfloat16 if cfg.train.precision is Precision.bf16 else None
    parallelize(
        task, meshes, cfg.train.recompute, cfg.train.compile, observer=observe, compute_dtype=compute_dtype
    )


def _prepare_deepspeed(task: Task, cfg: TrainConfig, device: str, world: int, drawn: bool) -> Engine:
    from moetrain.train.deepspeed.prepare import prepare  # an optional package

    return prepare(task, cfg, device, world, drawn)


# (task without memory, config, device, number of ranks, whether to draw the weights) -> engine
Prepare = Callable[[Task, TrainConfig, str, int, bool], Engine]
ENGINES: dict[str, Prepare] = {"native": prepare, "deepspeed": _prepare_deepspeed}  # by engine.name


def engine_of(name: str) -> Prepare:
    """What prepares the engine ``name``. Raises UserError for one that is not known."""
    if name not in ENGINES:
        raise UserError(f"engine.name={name} is not known; known: {', '.join(sorted(ENGINES))}")
    return ENGINES[name]
