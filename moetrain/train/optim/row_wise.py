"""One number a row for the second moment of large tables, whose rows are looked up.

Adam   v_r <- beta2 v_r + (1 - beta2) mean over the row of g^2, m as ever: half of AdamW's state.
Adagrad  v_r <- v_r + mean over the row of g^2, no m: almost none of it.

The mean square takes the place of the element's own square (Naumov et al. 2019, arXiv:1906.00091, for Adagrad
of embedding tables; FBGEMM calls the former "partial row-wise Adam"). A row that no token looked up has a
gradient of zero: Adagrad leaves it alone, Adam lets its momentum run out, as AdamW does.

Shapes: N rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.optim import Optimizer

from moetrain.ops.local_part import local_part
from moetrain.parallel.watchdog.flight_recorder import watched
from moetrain.train.optim.chained import ChainedOptimizer


class RowWise(ChainedOptimizer):
    """Row-wise Adam or Adagrad on ``tables``, ``others`` on what it was built with; one optimizer.

    State of a table: ``row_square`` [N, 1], and for Adam ``step`` and ``exp_avg`` in the table's own shape;
    placed as the table's rows are. Weight decay is decoupled. ``name`` is that of the tables' group.
    Raises ValueError for a parameter that is not [N, D].
    """

    def __init__(
        self,
        others: Optimizer | None,
        tables: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        momentum: bool,
        name: str = "tables",
    ) -> None:
        tables = list(tables)
        for table in tables:
            if table.ndim != 2:
                raise ValueError(f"a table has rows and columns, not shape {tuple(table.shape)}")
        group = {
            "params": tables,
            "name": name,
            "lr": lr,
            "weight_decay": weight_decay,
            "row_betas": betas if momentum else None,
            "eps": eps,
        }
        super().__init__([*(others.param_groups if others else []), group], others, "row_betas")

    def _step_own(self, table: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        lr, decay, eps = (float(group[key]) for key in ("lr", "weight_decay", "eps"))
        state, square_N1 = self.state[table], mean_squares(grad)
        if "row_square" not in state:
            state["row_square"] = torch.zeros_like(square_N1)
            if group["row_betas"] is not None:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(table)
        row_N1, local, local_grad = (local_part(t) for t in (state["row_square"], table, grad))
        square_N1 = local_part(square_N1)
        local.mul_(1 - lr * decay)
        if group["row_betas"] is None:
            row_N1.add_(square_N1)
            local.addcdiv_(local_grad, row_N1.sqrt() + eps, value=-lr)
            return
        beta1, beta2 = group["row_betas"]
        state["step"] += 1
        steps, mean = float(state["step"]), local_part(state["exp_avg"])
        mean.lerp_(local_grad, 1 - beta1)
        row_N1.lerp_(square_N1, 1 - beta2)
        denominator_N1 = (row_N1 / (1 - beta2**steps)).sqrt() + eps
        local.addcdiv_(mean, denominator_N1, value=-lr / (1 - beta1**steps))


def mean_squares(grad: Tensor) -> Tensor:
    """[N, 1]: of each whole row, also where columns are cut over ranks, and placed as the rows are."""
    sums_N1 = grad.square().sum(-1, keepdim=True)
    if isinstance(sums_N1, DTensor) and any(isinstance(p, Partial) for p in sums_N1.placements):
        whole = [Replicate() if isinstance(p, Partial) else p for p in sums_N1.placements]
        with watched("rows' squares", "all_reduce"):
            sums_N1 = sums_N1.redistribute(placements=whole)
    return sums_N1 / grad.shape[-1]
