"""Muon for a whole model: orthogonalised momentum on hidden matrices, AdamW on the rest, one optimizer.

Shapes: N matrices of one parameter, E experts, C matrices side by side (gate and up), (I, O) the input and
output widths of a matrix.

The rule per matrix is torch.optim.Muon's (Jordan et al. 2024): momentum, five Newton-Schulz iterations in
bf16, decoupled weight decay. That class takes 2-D parameters only; here a stacked parameter is as many
matrices as it stacks, and under FSDP each matrix is whole before it is orthogonalised: the result does not
depend on the layout of the ranks beyond bf16 rounding.

A 2-D parameter is [O, I] as in nn.Linear, a stacked one [E, I, O] or [E, I, C, O].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import AdamW

from moetrain.ops.local_part import local_part
from moetrain.parallel.watchdog.flight_recorder import watched
from moetrain.train.optim.chained import ChainedOptimizer

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, the quintic torch.optim.Muon uses too
_EPS = 1e-7  # a matrix of smaller norm counts as zero: an expert without tokens gets a zero update, not 0/0

MATRIX_DIMS = (2, 3, 4)


class Muon(ChainedOptimizer):
    """Muon on ``matrices``, torch's AdamW on ``adamw_groups`` (its ordinary parameter groups).

    State, in the parameter's own shape, dtype and placement: ``momentum`` for a matrix parameter; AdamW's
    ``step``, ``exp_avg``, ``exp_avg_sq`` for the others.

    A matrix's update is multiplied by lr * sqrt(max(1, O / I)) (Jordan et al. 2024). ``name`` is that of the
    matrices' group. Raises ValueError for a parameter of another number of dimensions.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        adamw_groups: list[dict[str, Any]],
        lr: float = 0.02,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adamw_options: dict[str, Any] | None = None,
        name: str = "muon",
    ) -> None:
        matrices = list(matrices)
        for matrix in matrices:
            if matrix.ndim not in MATRIX_DIMS:
                raise ValueError(
                    "Muon takes matrices [O, I] and stacks [E, I, O] or [E, I, C, O], not shape "
                    f"{tuple(matrix.shape)}"
                )
        adamw = AdamW(adamw_groups, **(adamw_options or {})) if adamw_groups else None
        group = {
            "params": matrices,
            "name": name,
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
        }
        others = adamw.param_groups if adamw else []
        super().__init__([*([group] if matrices else []), *others], adamw, "momentum")

    def _step_own(self, parameter: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"]
        momentum.lerp_(grad, 1 - group["momentum"])
        if group["lr"] == 0:
            return
        update = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

        def direction(whole: Tensor) -> Tensor:
            return _direction(whole, group["ns_steps"])

        local = local_part(parameter)
        local.mul_(1 - group["lr"] * group["weight_decay"])
        local.add_(_on_whole_matrices(direction, update), alpha=-group["lr"])


def orthogonalize(x_NAB: Tensor, steps: int) -> Tensor:
    """The nearest semi-orthogonal matrix to each of N, roughly (singular values 0.7 to 1.2), bf16 [N, A, B].

    Newton-Schulz as in torch.optim.Muon, all N at once. A zero matrix stays zero.
    """
    a, b, c = _COEFFICIENTS
    x = x_NAB.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.flatten(1).norm(dim=1).clamp(min=_EPS)[:, None, None]
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """(O, I) of each of a parameter's matrices."""
    outputs, inputs = (
        parameter.shape[:2] if parameter.ndim == 2 else (parameter.shape[-1], parameter.shape[1])
    )
    return outputs, inputs


def _direction(update: Tensor, steps: int) -> Tensor:
    """What the learning rate multiplies: same shape and dtype as ``update``."""
    outputs, inputs = matrix_shape(update)
    stacked = update.movedim(1, 2) if update.ndim == 4 else update  # [E, C, I, O]
    done_NAB = orthogonalize(stacked.reshape(-1, *stacked.shape[-2:]), steps)
    done = done_NAB.view(stacked.shape).to(update.dtype) * math.sqrt(max(1.0, outputs / inputs))
    return done.movedim(2, 1) if update.ndim == 4 else done


def _on_whole_matrices(direction: Callable[[Tensor], Tensor], update: Tensor) -> Tensor:
    """``direction`` of the whole ``update``, of which this rank's part is returned.

    A stacked parameter that is sharded by expert holds whole matrices already: each rank does its own
    experts. Anything else is gathered, and every rank computes the same.
    """
    if not isinstance(update, DTensor):
        return direction(update)
    by_expert = update.ndim > 2 and all(p.is_replicate() or p.is_shard(0) for p in update.placements)
    if by_expert:
        local = update.to_local()
        return direction(local) if local.numel() else local
    mesh = update.device_mesh
    with watched("a whole matrix for Muon", "all_gather"):
        gathered = update.full_tensor()
    whole = direction(gathered)
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=update.placements).to_local()
