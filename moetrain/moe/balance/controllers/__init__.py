"""Controllers by name. Importing a controller's module registers it."""

from moetrain.moe.balance.controllers.base import (
    CONTROLLERS,
    Controller,
    ControllerSpec,
    all_factors,
    build_controllers,
    chosen_controllers,
    controller_table,
    register_controller,
)
from moetrain.moe.balance.controllers.bias import BiasController
from moetrain.moe.balance.controllers.follower import LossFollower
from moetrain.moe.balance.controllers.measured import Measured
from moetrain.moe.balance.controllers.phi import PopulationLoad
from moetrain.moe.balance.controllers.quantile import QuantileController
from moetrain.moe.balance.controllers.running import RunningLoad
from moetrain.moe.balance.controllers.sparsity import SparsityController

__all__ = [
    "CONTROLLERS", "BiasController", "Controller", "ControllerSpec", "LossFollower", "Measured",
    "PopulationLoad", "QuantileController", "RunningLoad", "SparsityController", "all_factors",
    "build_controllers", "chosen_controllers", "controller_table", "register_controller",
]  # fmt: skip
