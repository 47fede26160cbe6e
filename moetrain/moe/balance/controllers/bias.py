"""The bias of the selection that balances without a loss. Shapes: E experts of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moetrain.bounds import above
from moetrain.moe.balance.controllers.base import Controller, register_controller
from moetrain.moe.routers import ROUTERS, Router
from moetrain.ops.transfer import to_device


@dataclass(frozen=True)
class BiasOptions:
    rate: float = field(default=0.001, metadata=above(0))


class BiasController(Controller):
    """Aux-loss-free balance: each expert's selection bias moves by ``rate`` towards the mean load.

    ``b_e += rate * sign(mean(c) - c_e)`` (Wang et al. 2024; DeepSeek-V3, section 2.1.2). The bias is the
    router's own buffer, so the checkpoint holds it with the model.
    """

    def __init__(self, routers: Mapping[int, Router], rate: float) -> None:
        self.routers, self.rate = dict(routers), rate

    @torch.no_grad()
    def update(
        self,
        demand: Mapping[int, Tensor],
        num_tokens: float = 0.0,
        losses: Mapping[str, Tensor] | None = None,
    ) -> None:
        routed = [
            (self.routers[layer], demand_E) for layer, demand_E in demand.items() if layer in self.routers
        ]
        if not routed:
            return
        loads = [demand_E.to(torch.float64) for _, demand_E in routed]
        signs = torch.cat([torch.sign(load_E.mean() - load_E) for load_E in loads])
        signs = to_device(signs, routed[0][0].bias_E.device)  # of all layers in one copy
        for (router, _), sign_E in zip(routed, signs.split([len(load_E) for load_E in loads]), strict=True):
            router.bias_E += self.rate * sign_E.to(router.bias_E)


def _refuses(router: Router) -> str | None:
    known = sorted(name for name, spec in ROUTERS.items() if spec.cls.reads_bias)
    return None if router.reads_bias else f"never reads the selection bias ({', '.join(known)} do)"


@register_controller(
    "bias",
    BiasOptions,
    refuses=_refuses,
    moves_bias=True,
    what="moves each expert's selection bias towards the mean load, by `rate`",
)
def _build(options: BiasOptions, routers: Mapping[int, Router]) -> Controller:
    return BiasController(routers, options.rate)
