"""What the engine ``deepspeed`` does at every stage of ZeRO, and stage 0, which cuts nothing.

The gradient rule holds: what a step updates by is a sum, never an average. DeepSpeed neither clips nor skips
an update: its norm at stage 0 is the average of the ranks' own, which differ where experts do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moetrain.checkpoint.state_dict import MODEL, OPTIM, model_tensors, optimizer_tensors
from moetrain.parallel.clip import all_reduce_total_, combined, local_total, scale_
from moetrain.parallel.mesh import EP, DataGroups
from moetrain.parallel.watchdog.flight_recorder import watched
from moetrain.train.deepspeed.experts import is_expert
from moetrain.train.deepspeed.layout import Layout
from moetrain.train.deepspeed.used import with_all_used
from moetrain.train.optim.build import set_lr
from moetrain.train.task import Task, TaskOutput


class DeepSpeedEngine(ABC):
    """``runtime`` is DeepSpeed's engine around ``task``, ``optimizer`` what it was given to update with."""

    def __init__(self, task: Task, runtime: Any, optimizer: Optimizer, layout: Layout) -> None:
        self.task, self.optimizer, self.layout = task, optimizer, layout
        self.data = DataGroups()
        self._runtime = runtime
        self._runtime.enable_backward_allreduce = False  # backward calls it, where the watchdog sees it
        self._trained = [p for p in task.parameters() if p.requires_grad]

    def forward(self, arguments: Mapping[str, object], last: bool) -> TaskOutput:
        self._runtime.set_gradient_accumulation_boundary(last)
        output: TaskOutput = self._runtime(**arguments)
        return output

    def backward(self, loss: Tensor) -> None:
        self._runtime.backward(self._loss(loss), scale_wrt_gas=False)
        with watched("DeepSpeed's sums of gradients"):
            self._sum_gradients()

    def clip(self, max_norm: float | None) -> Tensor:
        norm = self.norm()
        if max_norm is not None:
            scale_(self._held(), norm, max_norm)
        return norm

    @abstractmethod
    def norm(self, norm_type: float = 2.0) -> Tensor:
        """As of the interface."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor | None]:
        """As of the interface."""

    @abstractmethod
    def placed_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """As of the interface."""

    def update(self) -> None:
        with watched("DeepSpeed's update", "all_gather"):
            self._runtime.step()

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.task.named_parameters()}

    def editing(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()

    @abstractmethod
    def drop_gradients(self) -> None:
        """As of the interface."""

    def set_lr(self, factor: float) -> float:
        set_lr(self.optimizer, factor)
        peak: float = self.optimizer.param_groups[0]["peak_lr"]
        return peak * factor

    def model_tensors(self) -> dict[str, Tensor]:
        tensors = model_tensors(self.task.model)
        return {name: self._as_whole(tensor, tensor) for name, tensor in tensors.items()}

    @abstractmethod
    def optimizer_tensors(self) -> dict[str, Tensor]:
        """As of the interface."""

    @abstractmethod
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """As of the interface."""

    def forward_only(self) -> AbstractContextManager[None]:
        return nullcontext()

    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _loss(self, loss: Tensor) -> Tensor:
        """What DeepSpeed's backward pass begins with."""
        return with_all_used(loss, self._trained)

    def _sum_gradients(self) -> None:
        """Sum over the ranks what the stage sums now: after every backward pass, or after the last."""
        self._runtime.allreduce_gradients()

    @abstractmethod
    def _held(self) -> list[Tensor]:
        """All gradients that this rank holds, after the last backward pass of a step."""

    def _as_whole(self, parameter: Tensor, local: Tensor) -> Tensor:
        return self.layout.as_whole(parameter, local) if isinstance(parameter, nn.Parameter) else local


class Replicated(DeepSpeedEngine):
    """Stage 0: every rank sums all gradients and updates all weights that it holds."""

    def norm(self, norm_type: float = 2.0) -> Tensor:
        device = self._trained[0].device
        experts = [p.grad for p in self._trained if is_expert(p) and p.grad is not None]
        others = [p.grad for p in self._trained if not is_expert(p) and p.grad is not None]
        totals = [local_total(others, norm_type, device)]
        if self.layout.experts is not None:
            of_experts = local_total(experts, norm_type, device)
            group = self.layout.experts.get_group(EP)
            all_reduce_total_(of_experts, norm_type, group)
            totals.append(of_experts)
        return combined(totals, norm_type)

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: parameter.grad for name, parameter in self.task.named_parameters()}

    def placed_gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.task.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            yield name, self._as_whole(parameter, grad)

    def drop_gradients(self) -> None:
        self._runtime.zero_grad()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        parameters = model_tensors(self.task.model)
        found = {}
        for name, state in optimizer_tensors(self.task.model, self.optimizer).items():
            parameter = parameters[MODEL + name.removeprefix(OPTIM).rpartition(".")[0]]
            found[name] = self._as_whole(parameter, state) if state.shape == parameter.shape else state
        return found

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing: they are the live ones."""

    def _sum_gradients(self) -> None:
        """By DeepSpeed's bucketed all-reduce, without its list of dtypes, which has no fp64."""
        runtime = self._runtime
        if not runtime.is_gradient_accumulation_boundary():
            return
        dense, experts = runtime._get_gradients_for_reduction()
        runtime.allreduce_no_retain(dense, runtime.seq_data_parallel_group)
        for name, gradients in experts.items():
            runtime.allreduce_no_retain(gradients, runtime.expert_data_parallel_group[name])

    def _held(self) -> list[Tensor]:
        return [p.grad for p in self._trained if p.grad is not None]
