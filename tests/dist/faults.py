"""A plug-in that breaks the trainer on its ranks: ``plugins=[faults]`` and ``FAULT=name`` in the environment.

One process alone stays whole. Each fault is one that a framework has shipped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import moetrain.parallel.apply as apply
import moetrain.train.engine as engine
import moetrain.train.run as run
import moetrain.train.step as step
from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.moe.dispatch.collectives import Exchange
from moetrain.ops.local_part import local_part
from moetrain.train.log.metrics import RoutingStats


def experts_averaged_twice() -> None:
    """Summed over the ranks as it should be, and then divided by ep once more."""
    shard = apply._shard

    def broken(model: Any, blocks: Any, mesh: Any, spread: Any, *rest: Any) -> None:
        shard(model, blocks, mesh, spread, *rest)
        for module in spread:
            module.set_gradient_divide_factor(2.0)

    apply._shard = broken


def router_gradient_not_reduced() -> None:
    sync = engine.sync_gradients

    def broken(task: Any, last: bool) -> None:
        sync(task, last)
        for module in task.modules():
            if getattr(module, "is_router", False) and hasattr(module, "set_requires_gradient_sync"):
                module.set_requires_gradient_sync(False, recurse=False)

    engine.sync_gradients = broken


def norm_misses_the_experts() -> None:
    clip, norm = engine.clip_, engine.global_norm

    def others(parameters: Any) -> list[Any]:
        return [p for p in parameters if "ep" not in p.device_mesh.mesh_dim_names]

    engine.clip_ = lambda parameters, most: clip(others(parameters), most)
    engine.global_norm = lambda parameters, kind=2.0: norm(others(parameters), kind)


def an_expert_skipped_on_save() -> None:
    """Rank 1 saves zeros in the place of its first expert."""
    save = Checkpointer.save

    def broken(self: Any, number: int, tensors: Any, extra: Any) -> Any:
        kept = {}
        for name, tensor in tensors.items():
            if name.startswith("model.") and name.endswith("w_down_EFD") and os.environ["RANK"] == "1":
                tensor = tensor.detach().clone()
                local_part(tensor)[:1].zero_()
            kept[name] = tensor
        return save(self, number, kept, extra)

    Checkpointer.save = broken


def aux_loss_divided_by_world_size() -> None:
    total = step.total_loss

    def broken(*args: Any) -> Any:
        loss, raw = total(*args)
        return None if loss is None else loss / int(os.environ["WORLD_SIZE"]), raw

    step.total_loss = broken


def splits_swapped() -> None:
    """Each rank takes what it receives from one sender for that of another."""
    counts = Exchange.counts

    def broken(self: Any, sent_Pe: Any) -> Any:
        received_Pe, sent, received = counts(self, sent_Pe)
        return received_Pe.flip(0), sent, received[::-1]

    Exchange.counts = broken


def bias_not_synchronised() -> None:
    reduce = RoutingStats.reduce
    RoutingStats.reduce = lambda self, group=None: reduce(self, None)


def late_to_leave() -> None:
    """All but rank 0 stay five seconds longer than it after the last collective."""
    close = run._close

    def broken(*args: Any) -> None:
        close(*args)
        time.sleep(0 if os.environ["RANK"] == "0" else 5)

    run._close = broken


if os.environ.get("WORLD_SIZE", "1") != "1" and "FAULT" in os.environ:
    fault: Callable[[], None] = globals()[os.environ["FAULT"]]
    fault()
