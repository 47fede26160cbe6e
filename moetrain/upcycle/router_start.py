"""The router of a new MoE layer.

Shapes: E experts, D model, V virtual groups of neighbouring experts, T calibration tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.errors import UserError
from moetrain.models.options import ModelConfig
from moetrain.moe import build_router
from moetrain.moe.routers import full_options
from moetrain.upcycle.calibration import LayerCalibration, need
from moetrain.upcycle.cluster import balanced_kmeans
from moetrain.upcycle.draw import generator, normal
from moetrain.upcycle.options import MethodOptions, RouterStart
from moetrain.upcycle.plan import Plan
from moetrain.upcycle.target import Target


def check_start(options: MethodOptions, target: Target) -> None:
    """UserError for a start that cannot train."""
    top_k, num_experts = target.combine.top_k, target.model.num_experts
    if options.router_start is RouterStart.zeros and top_k != num_experts:
        raise UserError(
            f"method.router_start=zeros needs router.top_k={num_experts}, all experts, not {top_k}: ties go "
            "to the first experts, and the others would see no token; take normal"
        )


def start_router(
    options: MethodOptions,
    target: Target,
    plan: Plan,
    dtype: torch.dtype,
    seed: int,
    layer: int,
    calibration: LayerCalibration | None,
) -> dict[str, Tensor]:
    """The router's tensors by name (``weight_ED``, ``bias_E``): a row for each group, repeated in it.

    What else a router may hold starts as the router itself starts it.
    """
    state = own_start(target, dtype, seed, layer)
    if "weight_ED" in state:
        rows_VD = _rows(options, target.model, plan, dtype, seed, layer, calibration)
        state["weight_ED"] = rows_VD.to(dtype).repeat_interleave(plan.router_group, 0)
    return state


def cluster_directions(
    calibration: LayerCalibration | None, rows: int, d_model: int, seed: int, layer: int, wanted_by: str
) -> Tensor:
    """fp64 [V, D], of length 1: the centroids of ``rows`` balanced clusters of the inputs less their mean."""
    inputs_TD = need(calibration, "inputs_TD", d_model, layer, wanted_by)
    _, centroids_VD = balanced_kmeans(inputs_TD, rows, generator(seed, layer, "router"))
    apart_VD = centroids_VD - inputs_TD.double().mean(0)
    length_V1 = apart_VD.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    directions_VD: Tensor = apart_VD / length_V1
    return directions_VD


def own_start(target: Target, dtype: torch.dtype, seed: int, layer: int) -> dict[str, Tensor]:
    """The router's tensors by name, as the router itself begins."""
    options, cfg = full_options(target.router), target.model
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(seed, layer, "router's own").initial_seed())
        router = build_router(options.name, d_model=cfg.d_model, num_experts=cfg.num_experts, options=options)
    return {name: tensor.detach() for name, tensor in router.to(dtype).state_dict().items()}


def _rows(
    options: MethodOptions,
    cfg: ModelConfig,
    plan: Plan,
    dtype: torch.dtype,
    seed: int,
    layer: int,
    calibration: LayerCalibration | None,
) -> Tensor:
    rows, d_model = cfg.num_experts // plan.router_group, cfg.d_model
    std = 0.5 * d_model**-0.5 if options.router_std is None else options.router_std
    if options.router_start is RouterStart.zeros:
        return torch.zeros(rows, d_model, dtype=dtype)
    if options.router_start is RouterStart.normal:
        return normal((rows, d_model), generator(seed, layer, "router"), dtype) * std
    towards_VD = plan.towards_VD
    if towards_VD is None:
        wanted_by = "method.router_start=centroids"
        towards_VD = cluster_directions(calibration, rows, d_model, seed, layer, wanted_by)
    rows_VD: Tensor = towards_VD * (std * d_model**0.5)
    return rows_VD
