"""A plug-in for tests: in one training step a rank's MoE layers see one NaN. ``plugins=[faulty_input]``.

The environment variables FAULTY_STEP (from 0) and FAULTY_RANK say where.
"""

from __future__ import annotations

import os

from torch import Tensor

from moetrain.moe import MoELayer, RouterContext
from moetrain.moe.routing import Routing

TOKEN = 3
_forward = MoELayer.forward


def _spoil(
    self: MoELayer, x_BSD: Tensor, ctx: RouterContext | None = None, **inputs: Tensor | None
) -> tuple[Tensor, Routing]:
    here = os.environ.get("RANK", "0") == os.environ.get("FAULTY_RANK", "0")
    if here and self.training and ctx is not None and ctx.step == int(os.environ["FAULTY_STEP"]):
        x_BSD = x_BSD.clone()
        x_BSD.view(-1, x_BSD.shape[-1])[TOKEN, 2] = float("nan")
    return _forward(self, x_BSD, ctx, **inputs)


MoELayer.forward = _spoil  # type: ignore[method-assign]
