"""MaskMoE: each token id sees a few experts only, rare ids fewer still (Su et al. 2024, arXiv:2407.09816).

Shapes: T tokens, E experts, K top-k, V token ids that the table knows, v experts that a frequent id sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor

from moetrain.bounds import at_least, within
from moetrain.moe.assign import from_token_choice
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routers.hash_tables import read_numbers
from moetrain.moe.routers.hashed import expert_keys
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import softmax, top_ids

_VISIBLE = 8


@dataclass(frozen=True)
class MaskOptions(RouterConfig):
    name: str = "mask"
    top_k: Optional[int] = 1  # of the experts that the token's id sees
    # experts that a frequent id sees; null: 8, or all where there are fewer
    visible: Optional[int] = field(default=None, metadata=at_least(1))
    rare_visible: int = field(default=1, metadata=at_least(1))  # and any other id
    frequencies: Optional[str] = None  # a JSON file {token id: count}; null: every id is frequent
    # the most frequent ids that make up this share of all counted tokens are frequent
    frequent_share: float = field(default=0.9, metadata=within(0, 1))
    salt: int = 0  # other masks


@register("mask", MaskOptions, "Su et al. 2024, arXiv:2407.09816", "k of the experts that a token id sees")
class MaskRouter(LinearRouter):
    """Softmax over the experts that the token's id sees, of which the k best are taken with their scores.

    Which those are is a pseudo-random function of the id, computed and not stored; a rare id sees the first
    of what it would see as a frequent one. ``frequent_V``, built once from the file, is part of the state;
    ids beyond it are rare. Logits are those before the mask.

    Raises ValueError where the context has no token ids, for a file that cannot be read or is malformed, and
    for a number of visible experts below ``top_k`` or above E.
    """

    options: MaskOptions
    top_k: int
    reads_bias = True
    frequent_V: Tensor

    def __init__(self, d_model: int, num_experts: int, options: MaskOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)
        self.visible = min(_VISIBLE, num_experts) if options.visible is None else options.visible
        if not self.top_k <= self.visible <= num_experts:
            raise ValueError(
                f"router.visible={self.visible} must lie between top_k={self.top_k} and "
                f"num_experts={num_experts}"
            )
        if options.rare_visible > self.visible:
            raise ValueError(
                f"router.rare_visible={options.rare_visible} exceeds the {self.visible} experts that a "
                "frequent id sees: lower it, or raise router.visible"
            )
        if options.frequencies is not None:
            table = frequent_ids(
                read_numbers(options.frequencies, "frequencies", "count"), options.frequent_share
            )
            self.register_buffer("frequent_V", torch.tensor(table, dtype=torch.bool))

    def seen(self, ids_T: Tensor) -> Tensor:
        """Which experts each id sees, bool [T, E]."""
        keys_TE = expert_keys(ids_T, self.num_experts, self.options.salt)
        experts_Tv = keys_TE.topk(self.visible, dim=-1).indices
        number_T1 = torch.full_like(ids_T, self.visible)[:, None]
        if self.options.frequencies is not None:
            last = len(self.frequent_V) - 1
            frequent_T = self.frequent_V[ids_T.clamp(0, last)] & (ids_T >= 0) & (ids_T <= last)
            number_T1 = torch.where(frequent_T[:, None], number_T1, self.options.rare_visible)
        is_seen_Tv = torch.arange(self.visible, device=ids_T.device) < number_T1
        return torch.zeros_like(keys_TE, dtype=torch.bool).scatter_(1, experts_Tv, is_seen_Tv)

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        if ctx.token_ids_T is None:
            raise ValueError("router=mask needs token ids: give the layer a RouterContext with token_ids_T")
        seen_TE = self.seen(ctx.token_ids_T.to(torch.int64))
        logits_TE = self.logits(x_TD)
        scores_TE = softmax(logits_TE.masked_fill(~seen_TE, float("-inf")))
        selection_TE = (scores_TE.detach() + self.bias_E).masked_fill(~seen_TE, float("-inf"))
        ids_TK = top_ids(selection_TE, self.top_k)
        weights_TK = scores_TE.gather(-1, ids_TK)
        few = self.options.frequencies is not None and self.options.rare_visible < self.top_k
        if few:
            ids_TK = ids_TK.where(seen_TE.gather(-1, ids_TK), self.num_experts)
        num_experts = self.num_experts
        return from_token_choice(ids_TK, weights_TK, ctx, num_experts, scores_TE, logits_TE, ragged=few)


def frequent_ids(counts: Mapping[int, int], share: float) -> list[bool]:
    """Whether each id from 0 to the largest counted one is frequent.

    Ids by falling count (ties: the lower id) are, until those before hold ``share`` of the sum.
    """
    total, held = sum(counts.values()), 0
    table = [False] * (max(counts) + 1)
    for i in sorted(counts, key=lambda i: (-counts[i], i)):
        if held >= share * total:
            break
        table[i], held = counts[i] > 0, held + counts[i]
    return table
