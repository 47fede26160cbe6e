"""A router of one's own: registered, checked against what every router promises, used in a layer.

Run it: python THIS_FILE. With its folder on PYTHONPATH: moetrain train plugins=[own_router] router=top_share.
Shapes: B batch, S sequence, T = B S tokens, D model, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moetrain.bounds import within
from moetrain.moe import MoELayer, RouterContext, Routing
from moetrain.moe.assign import from_mask
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers import LinearRouter, register
from moetrain.moe.topk_ops import softmax
from moetrain.router_tools import check_router


@dataclass(frozen=True)
class TopShareOptions(RouterConfig):
    name: str = "top_share"
    # experts of at least this share of the best one's score
    share: float = field(default=0.5, metadata=within(0, 1, open_low=True))


@register("top_share", TopShareOptions, paper="an example", returns="one or more experts a token")
class TopShareRouter(LinearRouter):
    """Every expert whose biased probability reaches a share of the token's best."""

    options: TopShareOptions
    reads_bias = True  # so that the controller bias may move it

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = softmax(logits_TE)
        biased_TE = scores_TE.detach() + self.bias_E
        best_T1 = biased_TE.amax(-1, keepdim=True)
        mask_TE = best_T1 - biased_TE <= (1 - self.options.share) * best_T1.abs()
        return from_mask(mask_TE, scores_TE, ctx, scores_TE, logits_TE)


def main() -> list[str]:
    """Check it and use it; returns what broke."""
    broken = [outcome.failure for outcome in check_router("top_share") if outcome.failure is not None]
    print("\n".join(broken) or "every check holds")
    y_BSD, routing = MoELayer(16, 24, 5, router="top_share")(torch.randn(2, 11, 16))
    print(f"{tuple(y_BSD.shape)}: {len(routing.assignment.weights_N)} assignments of 22 tokens")
    return broken


if __name__ == "__main__":
    main()
