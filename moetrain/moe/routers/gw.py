"""GW-MoE: in training, tokens that are hard to place go to every expert (Wu et al. 2024, arXiv:2406.12375).

For fine-tuning a model that was trained by top-k. Shapes: T tokens, B sequences of S, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor

from moetrain.bounds import at_least
from moetrain.moe.assign import from_mask
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import softmax, top_ids


@dataclass(frozen=True)
class GWOptions(RouterConfig):
    name: str = "gw"
    top_k: Optional[int] = 1  # experts of all other tokens
    renormalize: bool = False  # whether their weights sum to 1
    # nats of entropy, from which on a token goes to all
    threshold: float = field(default=1.8, metadata=at_least(0))
    # such tokens of a sequence at most, its first; null: no bound
    slots: Optional[int] = field(default=None, metadata=at_least(0))


@register("gw", GWOptions, "Wu et al. 2024, arXiv:2406.12375", "k experts a token, or all")
class GWRouter(LinearRouter):
    """Top-k of the softmax p; in training, tokens whose entropy of p reaches the threshold take all experts,
    with weights p. Evaluation is top-k. Every expert of a token that goes to all is computed.
    """

    options: GWOptions
    reads_bias = True

    def __init__(self, d_model: int, num_experts: int, options: GWOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.sure_k = resolve_top_k(options.top_k, num_experts)
        self.usual_rows_per_token = 2.0 * self.sure_k

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = softmax(logits_TE)
        ids_TK = top_ids(scores_TE.detach() + self.bias_E, self.sure_k)
        mask_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, ids_TK, True)
        weights_TE = scores_TE
        if self.options.renormalize:
            weights_TE = scores_TE / scores_TE.gather(-1, ids_TK).sum(-1, keepdim=True)
        if self.training:
            unsure_T1 = self._unsure(scores_TE.detach(), ctx)[:, None]
            mask_TE, weights_TE = mask_TE | unsure_T1, torch.where(unsure_T1, scores_TE, weights_TE)
        return from_mask(mask_TE, weights_TE, ctx, scores_TE, logits_TE)

    def _unsure(self, scores_TE: Tensor, ctx: RouterContext) -> Tensor:
        """Tokens that go to all experts, bool [T]. What comes later in a sequence has no say."""
        unsure_T: Tensor = torch.special.entr(scores_TE).sum(-1) >= self.options.threshold
        if ctx.valid_T is not None:
            unsure_T = unsure_T & ctx.valid_T
        if self.options.slots is None:
            return unsure_T
        unsure_BS = unsure_T.view(ctx.batch, ctx.seq)
        return (unsure_BS & (unsure_BS.cumsum(1) <= self.options.slots)).view(-1)
