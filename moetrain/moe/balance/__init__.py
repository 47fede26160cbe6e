"""Load balance by name: losses that are pure functions of Routings, controllers updated after the step.

Importing a module of losses or controllers registers them.
"""

from moetrain.moe.balance import choice_losses as choice_losses
from moetrain.moe.balance import dirichlet as dirichlet
from moetrain.moe.balance import load_share as load_share
from moetrain.moe.balance import mean_losses as mean_losses
from moetrain.moe.balance import penalty as penalty
from moetrain.moe.balance import phi as phi
from moetrain.moe.balance import score_losses as score_losses
from moetrain.moe.balance import z as z
from moetrain.moe.balance.base import LOSSES, LossSpec, Seen, loss_table, probabilities, register_loss
from moetrain.moe.balance.controllers import (
    CONTROLLERS,
    BiasController,
    Controller,
    LossFollower,
    Measured,
    PopulationLoad,
    QuantileController,
    RunningLoad,
    SparsityController,
    all_factors,
    build_controllers,
    chosen_controllers,
    controller_table,
    register_controller,
)
from moetrain.moe.balance.terms import LossTerm, StepTotals, count_ahead, make_terms, total_loss

__all__ = [
    "CONTROLLERS", "LOSSES", "BiasController", "Controller", "LossFollower", "LossSpec", "LossTerm",
    "Measured", "PopulationLoad", "QuantileController", "RunningLoad", "Seen", "SparsityController",
    "StepTotals", "all_factors", "build_controllers", "chosen_controllers", "controller_table",
    "count_ahead", "loss_table", "make_terms", "probabilities", "register_controller", "register_loss",
    "total_loss",
]  # fmt: skip
