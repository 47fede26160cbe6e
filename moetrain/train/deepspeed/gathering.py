"""Stage 3: how a task's weights are cut over the ranks, and put together again while they are used.

A unit is a block of the decoder, or all that lies outside of blocks. Blocks are DeepSpeed's leaf modules:
their weights are gathered together before they run, forward and backward, whatever of them the tokens use, so
that all ranks gather in the same order. After a block's backward pass all of its gradients are summed, zeros
for what no token of this rank used. What lies outside of blocks is whole from a pass's beginning to its end.

DeepSpeed gathers a block again where the gradient of its hidden states enters it. Losses of its record lead
into it as well, but not before: autograd takes what was made last first, which the hidden states are.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.zero import Init, register_external_parameter
from deepspeed.utils import set_z3_leaf_module
from torch import nn

from moetrain.parallel.materialize import allocate, draw_parameters
from moetrain.parallel.watchdog.flight_recorder import watched
from moetrain.train.deepspeed.used import with_all_used
from moetrain.train.task import Task, TaskOutput


def is_cut(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed has cut ``parameter`` over the ranks already."""
    return hasattr(parameter, "ds_id")


def outside_blocks(task: Task) -> list[nn.Parameter]:
    """The parameters of ``task`` that lie in no block."""
    inside = set(task.blocks.parameters())
    return [parameter for parameter in task.parameters() if parameter not in inside]


def cut(task: Task, device: str, seed: int | None) -> None:
    """Allocate ``task``, draw its weights by ``seed`` unless that is None, and cut them, unit by unit."""
    blocks = next(name for name, module in task.named_modules() if module is task.blocks)
    for prefix, unit in [*((f"{blocks}.{n}.", block) for n, block in enumerate(task.blocks)), ("", task)]:
        allocate(unit, device)
        if seed is not None:
            named = [(prefix + name, p) for name, p in unit.named_parameters() if not is_cut(p)]
            draw_parameters(named, seed)
        with watched("DeepSpeed's start", "broadcast"):
            Init(module=unit, mem_efficient_linear=False, dtype=torch.float32)


def before_start(task: Task) -> None:
    """What must be at ``task`` before DeepSpeed adds its hooks to it: they wrap what these return."""
    outside = outside_blocks(task)
    for parameter in outside:
        register_external_parameter(task, parameter)
    trained = [parameter for parameter in outside if parameter.requires_grad]

    def use_all(_: nn.Module, __: Any, output: TaskOutput) -> TaskOutput:
        if output.loss_sum is None or not torch.is_grad_enabled():
            return output
        return output._replace(loss_sum=with_all_used(output.loss_sum, trained))

    task.register_forward_hook(use_all)
    for block in task.blocks:
        set_z3_leaf_module(block, True)
        block.register_forward_pre_hook(_with_gradient)


def watch(zero: Any, task: Task) -> None:
    """Let the watchdog see what ``zero``, DeepSpeed's optimizer, gathers and sums during the passes."""
    names = {module: name.removeprefix("model.") or "model" for name, module in task.named_modules()}
    coordinator = zero.parameter_offload.get_param_coordinator()
    fetch, reduce = coordinator.fetch_sub_module, zero.reduce_ready_partitions_and_remove_grads

    def fetch_sub_module(module: nn.Module, forward: bool) -> None:
        with watched("DeepSpeed's weights", "all_gather", layer=names.get(module, "")):
            fetch(module, forward)

    def reduce_ready_partitions_and_remove_grads(parameter: nn.Parameter) -> None:
        with watched("DeepSpeed's sums of gradients", "reduce_scatter"):
            reduce(parameter)

    coordinator.fetch_sub_module = fetch_sub_module
    zero.reduce_ready_partitions_and_remove_grads = reduce_ready_partitions_and_remove_grads


def _with_gradient(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A block's gradients are summed when its input's is there: without one, before they are there."""
    x, *others = args
    if torch.is_grad_enabled() and not x.requires_grad:
        x = x.detach().requires_grad_()
    return (x, *others)
