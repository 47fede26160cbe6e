"""Similarity-aware routing: by the scores of like tokens before (Nguyen et al. 2025, arXiv:2505.00792).

Shapes: T tokens, B sequences of S, D model, E experts, K top-k, W width of the similarity, C tokens before,
N = C + S tokens that a sequence has by then, Q queries of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.bounds import above, at_least
from moetrain.moe.assign import from_token_choice
from moetrain.moe.combine import Combine
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import softmax, top_ids
from moetrain.ops.init import Normal, parameter
from moetrain.ops.linear import wide_linear

_BLOCK = 256  # queries at once: no S x S numbers
_WIDTH = 64


@dataclass(frozen=True)
class SimilarityOptions(RouterConfig):
    name: str = "similarity"
    top_k: Optional[int] = None
    # of the space where tokens are compared; null: 64, or the model's where that is less
    width: Optional[int] = field(default=None, metadata=at_least(1, 2**24))
    # divides similarities before the softmax; null: the width's square root
    temperature: Optional[float] = field(default=None, metadata=above(0))

    def combine(self, num_experts: int) -> Combine:
        k = resolve_top_k(self.top_k, num_experts)
        return Combine.of_softmax(k, num_experts, self.drops, renormalized=True)


@register("similarity", SimilarityOptions, "Nguyen et al. 2025, arXiv:2505.00792", "k experts a token")
class SimilarityRouter(LinearRouter):
    """p~ = A p with p the softmax of the logits: the k best of p~, with weights of sum 1.

    A_ij is the softmax over j of (Q x_i . K x_j) / temperature, among the token itself and those before it
    in its sequence, or in its document where documents are told apart. The paper's mean is over all tokens,
    and would tell a language model of later ones. Scores are p~, logits those of p. In generation the
    context's memory has the tokens before.
    """

    options: SimilarityOptions
    top_k: int
    reads_bias = True

    def __init__(self, d_model: int, num_experts: int, options: SimilarityOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)
        self.width = min(_WIDTH, d_model) if options.width is None else options.width
        self.temperature = self.width**0.5 if options.temperature is None else options.temperature
        self.query_WD = parameter((self.width, d_model), Normal(d_model**-0.5))
        self.key_WD = parameter((self.width, d_model), Normal(d_model**-0.5))

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = self._averaged(softmax(logits_TE), x_TD, ctx)
        ids_TK = top_ids(scores_TE.detach() + self.bias_E, self.top_k)
        weights_TK = scores_TE.gather(-1, ids_TK)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return from_token_choice(ids_TK, weights_TK, ctx, self.num_experts, scores_TE, logits_TE)

    def _averaged(self, p_TE: Tensor, x_TD: Tensor, ctx: RouterContext) -> Tensor:
        """A p, [T, E]."""
        batch, seq = ctx.batch, ctx.seq
        query_BSW = wide_linear(x_TD, self.query_WD).view(batch, seq, self.width) / self.temperature
        kept_TX = torch.cat([wide_linear(x_TD, self.key_WD), p_TE], 1)
        kept_BNX = kept_TX.view(batch, seq, kept_TX.shape[1])
        if ctx.memory is not None:
            kept_BNX = ctx.memory.extend("rows", kept_BNX)
        before = kept_BNX.shape[1] - seq
        keys_BNW, p_BNE = kept_BNX.split([self.width, self.num_experts], -1)
        blocks = []
        for at in range(0, seq, _BLOCK):
            rows = slice(at, min(at + _BLOCK, seq))
            seen_BQN = _seen(ctx, rows, before)
            operands = (query_BSW[:, rows], keys_BNW[:, : seen_BQN.shape[2]], p_BNE[:, : seen_BQN.shape[2]])
            if seq > _BLOCK:  # A is computed again in the backward pass, not kept
                blocks.append(checkpoint(_mean, *operands, seen_BQN, use_reentrant=False))
            else:
                blocks.append(_mean(*operands, seen_BQN))
        return torch.cat(blocks, 1).view(-1, self.num_experts) if blocks else p_TE


def _mean(query_BQW: Tensor, keys_BNW: Tensor, p_BNE: Tensor, seen_BQN: Tensor) -> Tensor:
    similar_BQN = query_BQW @ keys_BNW.transpose(1, 2)
    return softmax(similar_BQN.masked_fill(~seen_BQN, float("-inf"))) @ p_BNE


def _seen(ctx: RouterContext, rows: slice, before: int) -> Tensor:
    """What the queries ``rows`` of each sequence may look at, bool [B, Q, N], up to the last query."""
    device = ctx.sample_ids_B.device
    place_Q = torch.arange(rows.start, rows.stop, device=device) + before
    seen_BQN = (torch.arange(before + rows.stop, device=device) <= place_Q[:, None]).repeat(ctx.batch, 1, 1)
    if ctx.doc_ids_T is not None:
        doc_BS = ctx.doc_ids_T.view(ctx.batch, ctx.seq)[:, : rows.stop]
        seen_BQN &= doc_BS[:, None] == doc_BS[:, rows, None]
    if ctx.valid_T is not None:
        seen_BQN[:, :, before:] &= ctx.valid_T.view(ctx.batch, 1, ctx.seq)[:, :, : rows.stop]
    return seen_BQN
