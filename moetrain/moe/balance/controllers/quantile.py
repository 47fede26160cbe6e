"""Quantile balancing: the selection bias that admits an even share of the step's tokens to every expert.

Shapes: T tokens, E experts of one layer, Q bins of a histogram.
Source: Moonshot AI 2026, Kimi K3 technical report, section 2.3.3 and appendices C and D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moetrain.bounds import at_least, within
from moetrain.moe.balance.controllers.base import Controller, register_controller
from moetrain.moe.routers import ROUTERS, Router
from moetrain.moe.routing import RoutingRecord


@dataclass(frozen=True)
class QuantileOptions:
    bins: int = field(default=1000, metadata=at_least(2, 2**16))
    # the share of the last bias that stays: 0 forgets it
    decay: float = field(default=0.0, metadata=within(0, 1, open_high=True))


class QuantileController(Controller):
    """Solves for each expert's selection bias once a step, from the scores of all of the step's tokens.

    A token's cutoff is the (k+1)-th largest of its biased scores, and cutoff - score the least bias
    with which an expert would be taken. The new bias is the k / E quantile of these over the tokens,
    less its mean over the experts. Each micro-batch is counted in ``bins`` uniform bins over [min bias
    - 1, max bias + 1], which holds every such number since scores lie in [0, 1]; the quantile is
    interpolated inside its bin.

    The bias is the router's own buffer, so the checkpoint holds it with the model; nothing else is kept.
    """

    def __init__(self, routers: Mapping[int, Router], bins: int = 1000, decay: float = 0.0) -> None:
        self.routers, self.bins, self.decay = dict(routers), bins, decay

    @torch.no_grad()
    def measure(self, layer: int, record: RoutingRecord) -> Tensor | None:
        """How often each expert needed a bias in each bin, int32 [E, Q], of the valid tokens."""
        router = self.routers.get(layer)
        if router is None or record.scores_TE is None:
            return None
        assert router.top_k is not None
        needed_TE = needed_bias(record.scores_TE, router.bias_E, router.top_k)
        low, width = _range(router.bias_E, self.bins)
        bin_TE = ((needed_TE - low) / width).nan_to_num(0.0).long().clamp_(0, self.bins - 1)
        counted_T = torch.ones_like(bin_TE[:, 0]) if record.valid_T is None else record.valid_T
        rows_E = torch.arange(router.num_experts, device=bin_TE.device) * self.bins
        counts_EQ = bin_TE.new_zeros(router.num_experts * self.bins, dtype=torch.int32)
        ones_TE = counted_T.to(torch.int32)[:, None].expand_as(bin_TE)
        counts_EQ.scatter_add_(0, (bin_TE + rows_E).reshape(-1), ones_TE.reshape(-1))
        return counts_EQ.view(router.num_experts, self.bins)

    @torch.no_grad()
    def follow(self, sums: Mapping[int, Tensor]) -> None:
        """Move every layer's bias to the quantile of the whole step; nothing waits for the device."""
        for layer, counts_EQ in sums.items():
            router = self.routers[layer]
            assert router.top_k is not None
            low, width = _range(router.bias_E, self.bins)
            place_E = quantile_place(counts_EQ, router.top_k / router.num_experts)
            new_E = low + place_E * width
            new_E = self.decay * router.bias_E.double() + (1 - self.decay) * (new_E - new_E.mean())
            routed = counts_EQ.sum() > 0  # a layer without a token keeps its bias
            router.bias_E.copy_(torch.where(routed, new_E.to(router.bias_E.dtype), router.bias_E))

    def update(
        self,
        demand: Mapping[int, Tensor],
        num_tokens: float = 0.0,
        losses: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Nothing: the demand of the step is not what this controller follows."""


def needed_bias(scores_TE: Tensor, bias_E: Tensor, top_k: int) -> Tensor:
    """The bias [T, E] with which each expert would just be taken: the token's cutoff less the score."""
    cutoff_T1 = (scores_TE + bias_E).topk(top_k + 1, dim=-1).values[:, -1:]
    return cutoff_T1 - scores_TE


def quantile_place(counts_EQ: Tensor, share: float) -> Tensor:
    """Where the ``share`` quantile of each histogram lies, fp64 [E], in bins from the first's left edge."""
    below_EQ = counts_EQ.double().cumsum(-1)
    target_E1 = share * below_EQ[:, -1:]
    bin_E1 = (below_EQ < target_E1).sum(-1, keepdim=True).clamp_(max=counts_EQ.shape[1] - 1)
    inside_E1 = counts_EQ.gather(-1, bin_E1).double()
    before_E1 = below_EQ.gather(-1, bin_E1) - inside_E1
    return (bin_E1 + (target_E1 - before_E1) / inside_E1.clamp(min=1)).squeeze(-1)


def _range(bias_E: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """The left edge of the first bin, and the bins' width; fp64 scalars."""
    wide_E = bias_E.double()
    low = wide_E.amin() - 1
    return low, (wide_E.amax() + 1 - low) / bins


def _refuses(router: Router) -> str | None:
    if not router.takes_best:
        known = ", ".join(sorted(name for name, spec in ROUTERS.items() if spec.cls.takes_best))
        return f"does not take the best of its scores plus the selection bias, as it is set up ({known} do)"
    if router.top_k == router.num_experts:
        return f"takes all of its {router.num_experts} experts for every token"
    return None


@register_controller(
    "quantile",
    QuantileOptions,
    refuses=_refuses,
    moves_bias=True,
    what="Kimi K3's: the selection bias becomes the one with which an even share of the step's tokens passes "
    "its cutoff, from a histogram of `bins`; `decay` keeps a share of the last bias",
)
def _build(options: QuantileOptions, routers: Mapping[int, Router]) -> Controller:
    fitting = {layer: router for layer, router in routers.items() if _refuses(router) is None}
    return QuantileController(fitting, options.bins, options.decay)
