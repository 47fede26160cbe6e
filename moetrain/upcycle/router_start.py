"""The router of a new MoE layer.

Shapes: E experts, D model, V virtual groups of neighbouring experts, T calibration tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.errors import UserError
from moetrain.moe import build_router
from moetrain.moe.routers import full_options
from moetrain.upcycle.calibration import LayerCalibration, need
from moetrain.upcycle.cluster import balanced_kmeans
from moetrain.upcycle.draw import generator, normal
from moetrain.upcycle.options import MethodOptions, RouterStart
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
    group: int,
    dtype: torch.dtype,
    seed: int,
    layer: int,
    calibration: LayerCalibration | None,
) -> dict[str, Tensor]:
    """The router's tensors by name (``weight_ED``, ``bias_E``): a row for each group, repeated in it.

    What else a router may hold starts as the router itself starts it.
    """
    cfg = target.model
    state = _own_start(target, dtype, seed, layer)
    if "weight_ED" in state:
        rows_VD = _rows(options, cfg.num_experts // group, cfg.d_model, dtype, seed, layer, calibration)
        state["weight_ED"] = rows_VD.to(dtype).repeat_interleave(group, 0)
    return state


def _own_start(target: Target, dtype: torch.dtype, seed: int, layer: int) -> dict[str, Tensor]:
    options, cfg = full_options(target.router), target.model
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(seed, layer, "router's own").initial_seed())
        router = build_router(options.name, d_model=cfg.d_model, num_experts=cfg.num_experts, options=options)
    return {name: tensor.detach() for name, tensor in router.to(dtype).state_dict().items()}


def _rows(
    options: MethodOptions,
    rows: int,
    d_model: int,
    dtype: torch.dtype,
    seed: int,
    layer: int,
    calibration: LayerCalibration | None,
) -> Tensor:
    std = 0.5 * d_model**-0.5 if options.router_std is None else options.router_std
    if options.router_start is RouterStart.zeros:
        return torch.zeros(rows, d_model, dtype=dtype)
    gen = generator(seed, layer, "router")
    if options.router_start is RouterStart.normal:
        return normal((rows, d_model), gen, dtype) * std
    inputs_TD = need(calibration, "inputs_TD", d_model, layer, "method.router_start=centroids")
    _, centroids_VD = balanced_kmeans(inputs_TD, rows, gen)
    apart_VD = centroids_VD - inputs_TD.double().mean(0)
    length_V1 = apart_VD.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    rows_VD: Tensor = apart_VD / length_V1 * (std * d_model**0.5)
    return rows_VD
