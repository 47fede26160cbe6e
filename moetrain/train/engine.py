"""Engines lay a task out over the ranks and update its weights: the interface, and the native engine.

A step is one forward and one backward per micro-batch, then ``clip``, then ``update`` or not, then
``drop_gradients``. The caller does not depend on the layout of weights, gradients and optimizer state.

The gradient rule: gradients are summed over micro-batches and ranks, never averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moetrain.checkpoint.state_dict import model_tensors, optimizer_tensors
from moetrain.errors import UserError
from moetrain.parallel.apply import parallelize, reshard, sync_gradients
from moetrain.parallel.clip import clip_, global_norm
from moetrain.parallel.materialize import allocate, draw
from moetrain.parallel.mesh import DataGroups, build_meshes
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

    def gradients(self) -> dict[str, Tensor | None]:
        """Parameter's name in the task -> this rank's part of its gradient. Any rank may ask alone."""

    def update(self) -> None:
        """Move the weights by the gradients, at the learning rate that was set."""

    def drop_gradients(self) -> None:
        """Forget the step's gradients. Any rank may do so alone."""

    def set_lr(self, factor: float) -> float:
        """Set every learning rate to ``factor`` times its peak; returns that of the first group."""

    def model_tensors(self) -> dict[str, Tensor]:
        """``model.<name>`` -> live parameter or persistent buffer; a load fills them in place."""

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """``optim.<name>.<key>`` -> live state of the optimizer; a load fills them in place."""

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
        parameters = list(self.task.parameters())
        return global_norm(parameters) if max_norm is None else clip_(parameters, max_norm)

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: parameter.grad for name, parameter in self.task.named_parameters()}

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
    compute_dtype = torch.bfloat16 if cfg.train.precision is Precision.bf16 else None
    parallelize(
        task, meshes, cfg.train.recompute, cfg.train.compile, observer=observe, compute_dtype=compute_dtype
    )
    return meshes.data


# (task without memory, config, device, number of ranks, whether to draw the weights) -> engine
Prepare = Callable[[Task, TrainConfig, str, int, bool], Engine]
ENGINES: dict[str, Prepare] = {"native": prepare}  # by engine.name


def engine_of(name: str) -> Prepare:
    """What prepares the engine ``name``. Raises UserError for one that is not known."""
    if name not in ENGINES:
        raise UserError(f"engine.name={name} is not known; known: {', '.join(sorted(ENGINES))}")
    return ENGINES[name]
