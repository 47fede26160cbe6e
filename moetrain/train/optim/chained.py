"""What optimizers have in common that update some groups themselves and hand the rest to another."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class ChainedOptimizer(Optimizer):
    """One optimizer of ``groups``: those with the key ``own_key`` by its own rule, the rest by ``others``."""

    def __init__(self, groups: list[dict[str, Any]], others: Optimizer | None, own_key: str) -> None:
        self._others, self._own_key = others, own_key
        super().__init__(groups, {})

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
        if self._others is not None:
            # Loading a state dict, and ensure_state, replace both, so they are handed over at every step.
            self._others.state = self.state
            self._others.param_groups = [group for group in self.param_groups if self._own_key not in group]
            self._others.step()
        for group in self.param_groups:
            for parameter in group["params"] if self._own_key in group else ():
                if parameter.grad is not None:
                    self._step_own(parameter, parameter.grad, group)
        return loss

    @abstractmethod
    def _step_own(self, parameter: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter of a group of its own."""
