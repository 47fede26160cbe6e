"""Experts as DeepSpeed expects them: in its own process groups, marked, in layers that are its MoE layers.

DeepSpeed finds experts by ``isinstance`` of its class MoE, and takes parameters with ``allreduce=False`` for
those whose gradients are summed over the ranks of ``group_name`` only. It takes no DTensor: here experts that
are spread over ranks are plain tensors, a rank's own block of the first dimension.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from moetrain.moe import MoELayer
from moetrain.parallel.mesh import EFSDP, EP


def group_name(ep: int) -> str:
    """What DeepSpeed calls the groups of ``ep`` ranks that share a layer's experts."""
    return f"ep_size_{ep}"


def expert_mesh(ep: int, world: int, device: str) -> DeviceMesh:
    """The mesh [efsdp, ep] of DeepSpeed's groups, which are made where they are not there yet."""
    name = group_name(ep)
    groups._create_expert_and_data_parallel(ep)
    alike, spread = groups._get_expert_data_parallel_group(name), groups._get_expert_parallel_group(name)
    ranks = torch.arange(world).view(-1, ep)
    return DeviceMesh.from_group([alike, spread], device, mesh=ranks, mesh_dim_names=(EFSDP, EP))


def present(model: nn.Module, ep: int) -> None:
    """Make the experts of every MoE layer of ``model`` plain, marked parameters, in place."""
    for layer in [m for m in model.modules() if isinstance(m, MoELayer)]:
        for name, parameter in list(layer.experts.named_parameters()):
            assert isinstance(parameter, DTensor)
            plain = nn.Parameter(parameter.to_local(), parameter.requires_grad)
            vars(plain).update(vars(parameter))
            plain.allreduce, plain.group_name = False, group_name(ep)  # type: ignore[attr-defined]
            path, _, leaf = name.rpartition(".")
            setattr(layer.experts.get_submodule(path), leaf, plain)
        if any(p.requires_grad for p in layer.experts.parameters()):  # it asks for a group to train
            layer.num_experts = layer.experts.num_experts  # type: ignore[assignment]
            layer.__class__ = _as_deepspeeds(type(layer))  # type: ignore[arg-type]  # mypy: not hashable


def is_expert(parameter: Tensor) -> bool:
    """Whether ranks of an ep group hold different blocks of ``parameter``."""
    return getattr(parameter, "allreduce", True) is False


def by_experts(groups_of_optimizer: list[dict[str, Any]], ep: int) -> list[dict[str, Any]]:
    """The same parameter groups, with experts in groups of their own, as ZeRO wants them."""
    found = []
    for group in groups_of_optimizer:
        experts = [p for p in group["params"] if is_expert(p)]
        others = [p for p in group["params"] if not is_expert(p)]
        found += [{**group, "params": others}] if others else []
        found += [{**group, "params": experts, "name": group_name(ep), "moe": True}] if experts else []
    return found


@cache
def _as_deepspeeds(kind: type[MoELayer]) -> type[MoELayer]:
    """``kind``, and DeepSpeed's MoE too; what it computes stays ``kind``'s."""

    def set_deepspeed_parallelism(self: MoELayer, *_: object, **__: object) -> None:
        """The groups are set by the layer's dispatcher."""

    both = type(kind.__name__, (kind, MoE), {"set_deepspeed_parallelism": set_deepspeed_parallelism})
    assert issubclass(both, MoELayer)
    return both
