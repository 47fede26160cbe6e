"""Load balance: losses that are pure functions of Routings, and controllers updated after the step."""

from moetrain.moe.balance.controllers import (
    BiasController,
    Controller,
    LossFollower,
    RunningLoad,
    SparsityController,
)
from moetrain.moe.balance.losses import LossTerm, StepTotals, balance_loss, make_terms, total_loss, z_loss

__all__ = [
    "BiasController", "Controller", "LossFollower", "LossTerm", "RunningLoad", "SparsityController",
    "StepTotals", "balance_loss", "make_terms", "total_loss", "z_loss",
]  # fmt: skip
