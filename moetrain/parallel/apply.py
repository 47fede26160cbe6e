"""Lay a finished model out over the ranks: experts, then recompute, then compile, then FSDP2.

The model is any module with ``blocks: nn.ModuleList``. Modules that carry ``is_router = True`` become an FSDP
group of their own. No step renames a parameter, so state dicts fit every layout.

One gradient rule: gradients are summed over ranks, never averaged. The loss is already divided by the
number of valid tokens of the whole step, so the sum is the gradient that one process would have.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from moetrain.compat import reduce_unused_gradients
from moetrain.moe import MoELayer
from moetrain.moe.dispatch.collectives import Calls, Exchange, Observer, unobserved
from moetrain.moe.dispatch.placement import Placement
from moetrain.ops.cheap import dropping_cheap
from moetrain.ops.local_part import local_part
from moetrain.parallel.dispatchers import build_dispatcher
from moetrain.parallel.mesh import EP, REPLICATE, Meshes
from moetrain.parallel.precision import gathered_in, is_router, rounded_to
from moetrain.parallel.rules import check_layer
from moetrain.parallel.watchdog.fsdp_comms import observe_fsdp

M = TypeVar("M", bound=nn.Module)

# Some routers and layers return views. No operation in place is made on what a module returned.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def parallelize(
    model: M,
    meshes: Meshes,
    recompute: bool = False,
    compile: bool = False,
    backend: str = "inductor",
    observer: Observer = unobserved,
    compute_dtype: torch.dtype | None = None,
) -> M:
    """Change ``model`` in place and return it. Build the optimizer afterwards: FSDP replaces parameters.

    recompute  keep only each block's inputs for the backward pass, and run the block again there.
    compile    torch.compile every block's forward with ``backend``.
    observer   is told every collective that a layer's dispatch or FSDP2 makes.
    compute_dtype  in which modules other than routers see their parameters; None: in the parameters' own.

    Raises ValueError for a model without ``blocks``, UserError where the ranks of ep cannot share a layer's
    experts.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no nn.ModuleList named 'blocks'")
    spread = _spread_experts(model, meshes, observer)
    for block in blocks:
        if compute_dtype and meshes.fsdp is None:  # innermost: recompute rounds again, and keeps no copies
            _set_forward(block, rounded_to(compute_dtype, block, block.forward))
        if recompute:
            _set_forward(block, _recomputed(block.forward))
        elif not compile:  # which decides for itself what to keep
            _set_forward(block, _without_cheap(block.forward))
        if compile:
            _set_forward(block, torch.compile(block.forward, backend=backend))
    if meshes.fsdp is not None:
        _shard(model, blocks, meshes.fsdp, spread, meshes.experts_fsdp, gathered_in(compute_dtype))
        _observe_shards(model, spread, meshes, observer)
    return model


def _placement(mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard | None]:
    """How FSDP2 shards a rank's experts, or a router: whole rows where they go round, else by columns.

    With more ranks than rows most would hold none, and each gather would bring their padding.
    """
    ways = mesh.size(mesh.ndim - 1)

    def place(parameter: nn.Parameter) -> Shard | None:
        local = local_part(parameter)
        uneven = local.ndim > 1 and local.shape[0] % ways
        return Shard(1) if uneven and local.shape[1] % ways == 0 else None

    return place


def _where_rows_are_few(mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard | None]:
    """By columns what has fewer rows than there are ranks, such as keys of few heads; all else by rows.

    A cut of columns is copied when it is gathered, which whole rows are not.
    """
    ways, by_columns = mesh.size(mesh.ndim - 1), _placement(mesh)

    def place(parameter: nn.Parameter) -> Shard | None:
        return by_columns(parameter) if parameter.shape[0] < ways else None

    return place


def _spread_experts(model: nn.Module, meshes: Meshes, observer: Observer) -> list[nn.Module]:
    """Give each rank of ``ep`` its block of every layer's experts; returns the modules that hold them."""
    if meshes.sparse is None:
        return []
    mesh = meshes.sparse[EP]
    layers = {_short(name): m for name, m in model.named_modules() if isinstance(m, MoELayer)}
    calls = Calls(list(layers))
    holders: list[nn.Module] = []
    for layer_name, layer in layers.items():
        check_layer(meshes.cfg, layer.experts.num_experts, layer_name, layer.slices is not None)
        placement = Placement.contiguous(layer.experts.num_experts, mesh.size())
        here = placement.of_rank(mesh.get_local_rank())
        for name, parameter in list(layer.experts.named_parameters()):
            local = parameter.detach().narrow(0, here[0], len(here)).clone()
            placed = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
            fresh = nn.Parameter(placed, parameter.requires_grad)
            vars(fresh).update(vars(parameter))
            path, _, leaf = name.rpartition(".")
            setattr(layer.experts.get_submodule(path), leaf, fresh)
        layer.experts.first_expert = here[0]
        exchange = Exchange(mesh.get_group(), layer_name, observer, calls)
        device = torch.device(mesh.device_type)  # the weights may lie on the meta device still
        layer.dispatcher = build_dispatcher(meshes, exchange, placement, device, layer.dispatcher.block)
        layer.use_backend(layer.experts.backend)
        holders.append(layer.experts)
    return holders


def _observe_shards(model: nn.Module, spread: list[nn.Module], meshes: Meshes, observer: Observer) -> None:
    experts = set(map(id, spread))
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            mesh = meshes.sparse if id(module) in experts else meshes.dense
            replicas = mesh[REPLICATE].get_group() if mesh and meshes.dp_replicate > 1 else None
            observe_fsdp(module, _short(name) or "model", replicas, observer)


def _short(name: str) -> str:
    """A module's name as the user knows it, without that of the task around the model."""
    return name.removeprefix("model").removeprefix(".")


def sync_gradients(model: nn.Module, last: bool) -> None:
    """Call before each micro-batch's forward: only the ``last`` backward of a step sums over the ranks.

    Every rank must run the same number of micro-batches.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)


def reshard(model: nn.Module) -> None:
    """Free the gathered weights after forward passes without a backward pass (evaluation, sampling).

    Until then ``model.parameters()`` yields the root's whole tensors instead of the optimizer's shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def _without_cheap(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with dropping_cheap():
            return forward(*args, **kwargs)

    return run


def _set_forward(block: nn.Module, forward: Callable[..., Any]) -> None:
    """Replace the call, not the module: a wrapping module would put its own name into every parameter's."""
    block.forward = forward


def _shard(
    model: nn.Module,
    blocks: nn.ModuleList,
    mesh: DeviceMesh,
    spread: list[nn.Module],
    experts_mesh: DeviceMesh | None,
    policy: MixedPrecisionPolicy,
) -> None:
    attributes = {name: dict(vars(parameter)) for name, parameter in model.named_parameters()}
    routers = [m for m in model.modules() if is_router(m) and list(m.parameters())]
    for module in spread:
        assert experts_mesh is not None
        fully_shard(module, mesh=experts_mesh, mp_policy=policy, shard_placement_fn=_placement(experts_mesh))
        for name in getattr(module, "forward_methods", ()):
            register_fsdp_forward_method(module, name)
    for module in routers:
        fully_shard(module, mesh=mesh, mp_policy=gathered_in(None), shard_placement_fn=_placement(mesh))
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=_where_rows_are_few(mesh))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
    if isinstance(model, FSDPModule):
        # A rank whose tokens miss a parameter still takes part in that parameter's sum.
        reduce_unused_gradients(model)
    for name, parameter in model.named_parameters():
        vars(parameter).update(attributes[name])
