"""What controllers measure of one step. Shapes are each controller's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from moetrain.moe.balance.controllers.base import Controller
from moetrain.moe.routing import RoutingRecord


class Measured:
    """Sums over micro-batches of what each controller measures of each layer."""

    def __init__(self, controllers: Sequence[Controller]) -> None:
        self._controllers = controllers
        self._sums: list[dict[int, Tensor]] = [{} for _ in controllers]

    def clear(self) -> None:
        """Begin a step."""
        self._sums = [{} for _ in self._controllers]

    def add(self, records: Mapping[int, RoutingRecord]) -> None:
        """Measure one micro-batch: a layer's place -> its record."""
        for controller, sums in zip(self._controllers, self._sums, strict=True):
            for layer, record in records.items():
                found = controller.measure(layer, record)
                if found is not None:
                    sums[layer] = sums[layer] + found if layer in sums else found

    def tensors(self) -> list[Tensor]:
        """All sums, to be added up over ranks in place; the same shapes in the same order on every rank."""
        return [tensor for sums in self._sums for tensor in sums.values()]

    def follow(self) -> None:
        """Hand each controller its sums, which hold the whole step by now."""
        for controller, sums in zip(self._controllers, self._sums, strict=True):
            if sums:
                controller.follow(sums)
