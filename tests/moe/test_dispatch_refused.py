"""Dispatchers and placements that cannot be.

Shapes: E experts.
"""

from __future__ import annotations

import pytest
import torch

from moetrain.moe.dispatch.all_to_all import AllToAllDispatcher
from moetrain.moe.dispatch.collectives import Exchange
from moetrain.moe.dispatch.placement import Placement

CPU = torch.device("cpu")


def test_chunks_that_cannot_be_are_refused():
    class Two:
        def size(self) -> int:
            return 2

    with pytest.raises(ValueError, match="overlap=7, but there are 6 experts a rank"):
        AllToAllDispatcher(Exchange(Two()), Placement.contiguous(12, 2), CPU, overlap=7)


def test_placements_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="2 ranks do not divide 13 experts"):
        Placement.contiguous(13, 2)
    with pytest.raises(ValueError, match=r"names each of its experts once, not \(0, 2, 2, 3\)"):
        Placement(2, (0, 2, 2, 3))
