"""EMO: the tokens of a document choose within a pool of experts that the document prefers.

In training each document gets the experts of its largest summed probabilities, as many as are drawn for it;
its tokens take their k best of these. So experts that a domain needs come to lie together, and a domain can
be served with few of them. Evaluation takes all experts (``all``), or a pool of ``eval_pool`` (``pool``),
which looks at the whole document, as training does.

Source: Wang, Bhagia, Min 2026, arXiv:2605.06663, by the released code (allenai/EMO: the router ``two-level
... randpool``, its training script, and its Hugging Face model, which has no pools). That code draws sizes
from torch's generator; here they are functions of (seed, step, layer, sample, the document's first
position).

Shapes: T tokens, E experts, K top-k, G documents' parts of sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor

from moetrain.bounds import at_least
from moetrain.moe.assign import from_token_choice
from moetrain.moe.context import RouterContext
from moetrain.moe.evaluation import Words, token_choice
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import softmax, top_ids

_SALT = 0xE303


@dataclass(frozen=True)
class EMOOptions(RouterConfig):
    name: str = "emo"
    top_k: Optional[int] = None  # null: 2, or 1 where there is one expert
    # a training document's experts are drawn from min_pool to max_pool, both included
    min_pool: Optional[int] = field(default=None, metadata=at_least(1))  # null: a sixteenth, top_k at least
    max_pool: Optional[int] = field(default=None, metadata=at_least(1))  # null: all experts
    # of the evaluation by pools; null: a quarter, top_k at least
    eval_pool: Optional[int] = field(default=None, metadata=at_least(1))

    def evaluation_rule(self, num_experts: int) -> Words:
        return token_choice(resolve_top_k(self.top_k, num_experts))


@register(
    "emo", EMOOptions, "Wang et al. 2026, arXiv:2605.06663", "k experts a token, of its document's pool"
)
class EMORouter(LinearRouter):
    """Weights are the softmax over the pool, not renormalised; scores and logits are 0 and -inf outside it.

    Without documents (``ctx.doc_ids_T``) a sequence is one. Padding has no part in a pool. Raises ValueError
    unless top_k <= min_pool <= max_pool <= E, and eval_pool lies between top_k and E.
    """

    options: EMOOptions
    top_k: int
    causal = False  # a pool depends on the document's later tokens
    reads_bias = True
    eval_modes = ("all", "pool")

    def __init__(self, d_model: int, num_experts: int, options: EMOOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)
        self.max_pool = num_experts if options.max_pool is None else options.max_pool
        least = max(self.top_k, num_experts // 16)
        self.min_pool = min(least, self.max_pool) if options.min_pool is None else options.min_pool
        quarter = max(self.top_k, num_experts // 4)
        self.eval_pool = quarter if options.eval_pool is None else options.eval_pool
        if not self.top_k <= self.min_pool <= self.max_pool <= num_experts:
            raise ValueError(
                f"router.min_pool={self.min_pool} and router.max_pool={self.max_pool} must lie in this order "
                f"between router.top_k={self.top_k} and num_experts={num_experts}"
            )
        if not self.top_k <= self.eval_pool <= num_experts:
            raise ValueError(
                f"router.eval_pool={self.eval_pool} must lie between router.top_k={self.top_k} and "
                f"num_experts={num_experts}"
            )

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        if self.training or self.eval_mode == "pool":
            outside_TE = ~self._pools(logits_TE.detach(), ctx)
            logits_TE = logits_TE.masked_fill(outside_TE, float("-inf"))
            scores_TE = softmax(logits_TE)
            selection_TE = (scores_TE.detach() + self.bias_E).masked_fill(outside_TE, float("-inf"))
        else:
            scores_TE = softmax(logits_TE)
            selection_TE = scores_TE.detach() + self.bias_E
        ids_TK = top_ids(selection_TE, self.top_k)
        weights_TK = scores_TE.gather(-1, ids_TK)
        return from_token_choice(ids_TK, weights_TK, ctx, self.num_experts, scores_TE, logits_TE)

    def _pools(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """Whether an expert lies in the pool of a token's document, bool [T, E]."""
        document_T, first_G = documents(ctx)
        p_TE = softmax(logits_TE).nan_to_num(0.0)  # the loss is to tell of what is not finite
        if ctx.valid_T is not None:
            p_TE = p_TE * ctx.valid_T[:, None]
        sums_GE = p_TE.new_zeros(len(first_G), self.num_experts).index_add_(0, document_T, p_TE)
        order_GE = top_ids(sums_GE, self.num_experts)
        rank_E = torch.arange(self.num_experts, device=order_GE.device)
        rank_GE = torch.empty_like(order_GE).scatter_(1, order_GE, rank_E.expand_as(order_GE))
        in_pool_GE = rank_GE < self._sizes(ctx, first_G)[:, None]
        return in_pool_GE[document_T]

    def _sizes(self, ctx: RouterContext, first_G: Tensor) -> Tensor:
        """The number of experts in each document's pool, int64 [G]."""
        if not self.training:
            return torch.full_like(first_G, self.eval_pool)
        noise_G = ctx.uniform((ctx.batch * ctx.seq,), _SALT)[first_G]
        return self.min_pool + (noise_G * (self.max_pool - self.min_pool + 1)).long()


def documents(ctx: RouterContext) -> tuple[Tensor, Tensor]:
    """(each token's document, int64 [T], counted over the batch; each document's first token [G]).

    A document's parts in two sequences are two. Waits for the device, for their number.
    """
    is_first_T = ctx.positions_T == 0
    if ctx.doc_ids_T is not None:
        is_first_T = is_first_T | (ctx.doc_ids_T != ctx.doc_ids_T.roll(1))
    return is_first_T.cumsum(0) - 1, is_first_T.nonzero().squeeze(1)
