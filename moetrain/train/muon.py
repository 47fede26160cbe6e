"""Muon for a whole model: orthogonalised momentum on hidden matrices, AdamW on the rest, one optimizer.

Shapes: N matrices of one parameter, E experts, (I, O) the input and output widths of a matrix.

The rule per matrix is torch.optim.Muon's (Jordan et al. 2024): momentum, five Newton-Schulz iterations in
bf16, decoupled weight decay. That class takes 2-D parameters only; here a stacked parameter [E, I, O] is E
matrices, a fused one (gate and up, or q, k and v) as many as it fuses, and under FSDP each matrix is whole
before it is orthogonalised: the result does not depend on the layout of the ranks beyond bf16 rounding.

A 2-D parameter is [O, I] as in nn.Linear, a stacked one [E, I, O].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import AdamW, Optimizer

from moetrain.ops.local_part import local_part
from moetrain.parallel.journal import watched

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, the quintic torch.optim.Muon uses too
_EPS = 1e-7  # a matrix of smaller norm counts as zero: an expert without tokens gets a zero update, not 0/0

ADJUST_LR = ("original", "match_rms_adamw")


@dataclass(frozen=True)
class MuonParameter:
    """A parameter, and the widths of the matrices fused along its output dimension (empty: not fused)."""

    parameter: nn.Parameter
    splits: tuple[int, ...] = ()


class Muon(Optimizer):
    """Muon on ``matrices``, torch's AdamW on ``adamw_groups`` (its ordinary parameter groups).

    State, in the parameter's own shape, dtype and placement: ``momentum`` for a matrix parameter; AdamW's
    ``step``, ``exp_avg``, ``exp_avg_sq`` for the others.

    adjust_lr   ``original``: lr * sqrt(max(1, O / I)) (Jordan et al. 2024). ``match_rms_adamw``:
                lr * 0.2 * sqrt(max(O, I)), whose update has AdamW's usual size, so that AdamW's lr fits
                (Liu et al. 2025, "Muon is scalable for LLM training", the Moonlight report).
    name        of the matrices' group.

    Raises ValueError for a parameter that is not 2-D or 3-D, splits that do not add up to the output
    width, and an unknown ``adjust_lr``.
    """

    def __init__(
        self,
        matrices: Iterable[MuonParameter],
        adamw_groups: list[dict[str, Any]],
        lr: float = 0.02,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr: str = "original",
        adamw_options: dict[str, Any] | None = None,
        name: str = "muon",
    ) -> None:
        if adjust_lr not in ADJUST_LR:
            raise ValueError(f"adjust_lr={adjust_lr!r}; known: {', '.join(ADJUST_LR)}")
        matrices = list(matrices)
        for matrix in matrices:
            _check_shape(matrix)
        self._splits = {matrix.parameter: matrix.splits for matrix in matrices}
        self._adamw = AdamW(adamw_groups, **(adamw_options or {})) if adamw_groups else None
        group = {
            "params": [matrix.parameter for matrix in matrices],
            "name": name,
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr": adjust_lr,
        }
        others = self._adamw.param_groups if self._adamw else []
        super().__init__([*([group] if matrices else []), *others], {})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update. Parameters without a gradient are left alone, as in torch's optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "momentum" in group:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_matrix(parameter, group)
        if self._adamw is not None:
            # Loading a state dict replaces both, so they are handed over at every step.
            self._adamw.state = self.state
            self._adamw.param_groups = [group for group in self.param_groups if "betas" in group]
            self._adamw.step()
        return loss

    def _step_matrix(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        grad, state = parameter.grad, self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"]
        momentum.lerp_(grad, 1 - group["momentum"])
        if group["lr"] == 0:
            return
        update = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        splits = self._splits[parameter]

        def direction(whole: Tensor) -> Tensor:
            return _direction(whole, splits, group["ns_steps"], group["adjust_lr"])

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


def _direction(update: Tensor, splits: tuple[int, ...], steps: int, adjust_lr: str) -> Tensor:
    """What the learning rate multiplies: same shape and dtype as ``update`` ([O, I] or [E, I, O])."""
    dim = _output_dim(update)
    parts = update.split(splits, dim) if splits else (update,)
    done = []
    for part in parts:
        matrices = part if part.ndim == 3 else part[None]
        result = orthogonalize(matrices, steps).view_as(part).to(update.dtype)
        done.append(result * _lr_ratio(part, adjust_lr))
    return torch.cat(done, dim) if len(done) > 1 else done[0]


def _lr_ratio(part: Tensor, adjust_lr: str) -> float:
    outputs, inputs = (part.shape[0], part.shape[1]) if part.ndim == 2 else (part.shape[2], part.shape[1])
    if adjust_lr == "original":
        return math.sqrt(max(1.0, outputs / inputs))
    return 0.2 * math.sqrt(max(outputs, inputs))


def _on_whole_matrices(direction: Callable[[Tensor], Tensor], update: Tensor) -> Tensor:
    """``direction`` of the whole ``update``, of which this rank's part is returned.

    A stacked parameter that is sharded by expert holds whole matrices already: each rank does its own
    experts. Anything else is gathered, and every rank computes the same.
    """
    if not isinstance(update, DTensor):
        return direction(update)
    by_expert = update.ndim == 3 and all(p.is_replicate() or p.is_shard(0) for p in update.placements)
    if by_expert:
        local = update.to_local()
        return direction(local) if local.numel() else local
    mesh = update.device_mesh
    with watched("a whole matrix for Muon", "all_gather"):
        gathered = update.full_tensor()
    whole = direction(gathered)
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=update.placements).to_local()


def _output_dim(tensor: Tensor) -> int:
    return 0 if tensor.ndim == 2 else 2


def _check_shape(matrix: MuonParameter) -> None:
    parameter, splits = matrix.parameter, matrix.splits
    if parameter.ndim not in (2, 3):
        raise ValueError(
            f"Muon takes matrices [O, I] and stacks [E, I, O], not shape {tuple(parameter.shape)}"
        )
    width = parameter.shape[_output_dim(parameter)]
    if splits and sum(splits) != width:
        raise ValueError(f"muon_splits {splits} add up to {sum(splits)}, but the output width is {width}")
