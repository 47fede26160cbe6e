"""From a task without memory to the engine ``deepspeed``."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from moetrain.parallel.distributed import local_rank
from moetrain.parallel.materialize import allocate, draw
from moetrain.parallel.mesh import Meshes, build_levels
from moetrain.parallel.rules import check_layout
from moetrain.parallel.watchdog.flight_recorder import watched
from moetrain.train.deepspeed.config import Json, merged_config
from moetrain.train.deepspeed.options import DeepSpeedConfig
from moetrain.train.engine import Engine, spread
from moetrain.train.optim.build import build_optimizer, group_parameters
from moetrain.train.options import Precision, TrainConfig
from moetrain.train.task import Task


def prepare(task: Task, cfg: TrainConfig, device: str, world: int, drawn: bool) -> Engine:
    """As :func:`moetrain.train.engine.prepare`, by DeepSpeed.

    Raises UserError for what is no layout of ``world`` ranks.
    """
    assert isinstance(cfg.engine, DeepSpeedConfig)
    check_layout(cfg.parallel, world)
    _join(device)
    import deepspeed

    _quieten(deepspeed)

    from moetrain.train.deepspeed.engine import DeepSpeedEngine, Replicated
    from moetrain.train.deepspeed.experts import expert_mesh
    from moetrain.train.deepspeed.layout import Layout
    from moetrain.train.deepspeed.partitioned import Partitioned
    from moetrain.train.deepspeed.sharded import Sharded

    ep, stage = cfg.parallel.ep, cfg.engine.zero_stage
    with watched("the process groups of the layout", ""):
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        ranks = init_device_mesh(device, (world,))
        experts: DeviceMesh | None = expert_mesh(ep, world, device) if ep > 1 else None
        levels = build_levels(cfg.parallel, world, device) if ep > 1 else None
    spread(task, cfg, Meshes(1, world, ep, None, experts, levels, cfg.parallel))
    config = merged_config(cfg.engine)
    lay = _cut if stage == 3 else _allocated
    optimizer = lay(task, cfg, device, cfg.train.seed if drawn else None, config)
    with watched("DeepSpeed's start", "broadcast"):
        runtime, *_ = deepspeed.initialize(
            model=task, optimizer=optimizer, config=config, dist_init_required=False
        )
    if cfg.train.precision is Precision.fp64:
        runtime.communication_data_type = torch.float64  # which its configuration has no word for
    kind: type[DeepSpeedEngine] = (Replicated, Partitioned, Partitioned, Sharded)[stage]
    return kind(task, runtime, optimizer, Layout(ranks, experts))


def _allocated(task: Task, cfg: TrainConfig, device: str, seed: int | None, config: Json) -> Optimizer:
    """Whole weights on every rank, of experts its own block, and their optimizer. No seed: none are drawn."""
    from moetrain.train.deepspeed.experts import by_experts, present

    assert isinstance(cfg.engine, DeepSpeedConfig)
    allocate(task, device)
    if seed is not None:
        draw(task, seed)
    if cfg.parallel.ep > 1:
        present(task, cfg.parallel.ep)
    optimizer = build_optimizer(task, cfg.optim)
    if cfg.engine.zero_stage:
        optimizer.param_groups[:] = by_experts(optimizer.param_groups, cfg.parallel.ep)
        _fit_buckets(config, task)
    return optimizer


def _cut(task: Task, cfg: TrainConfig, device: str, seed: int | None, config: Json) -> Optimizer:
    """A piece of every weight, and an optimizer whose groups go by the shapes of whole ones."""
    from moetrain.train.deepspeed.gathering import before_start, cut

    _fit_buckets(config, task)
    grouped = group_parameters(task, muon=False)
    cut(task, device, seed)
    named = dict(task.named_parameters())  # others than those on the meta device
    groups = {group: [(name, named[name]) for name, _ in of] for group, of in grouped.items()}
    before_start(task)
    return build_optimizer(task, cfg.optim, groups)


def _join(device: str) -> None:
    """What DeepSpeed asks of its process: a process group, also of one rank, and the accelerator by name."""
    os.environ.setdefault("DS_ACCELERATOR", device)  # else it looks for one, and warns where there is none
    os.environ.setdefault("LOCAL_RANK", str(local_rank()))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def _quieten(package: Any) -> None:
    """Leave out an operator of inference, which it compiles wherever it can, and warnings at every step."""
    package.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor. is deprecated")


def _fit_buckets(config: Json, task: Task) -> None:
    """A buffer of gradients is allocated whole at every step: no larger than all gradients together."""
    zero = config["zero_optimization"]
    assert isinstance(zero, dict)
    size = zero["reduce_bucket_size"]
    elements = sum(p.numel() for p in task.parameters() if p.requires_grad)
    if isinstance(size, (int, float)) and size > elements:
        zero["reduce_bucket_size"] = elements
