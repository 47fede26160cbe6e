"""The router in plain torch, in any floating type: what the kernels of ``router`` compute.

Shapes: T tokens, E experts, K chosen, M groups of experts.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Rule(Protocol):
    """What is read of ``router.rule.Rule``."""

    @property
    def top_k(self) -> int: ...
    @property
    def score(self) -> str: ...
    @property
    def renormalize(self) -> bool: ...
    @property
    def route_scale(self) -> float: ...
    @property
    def num_groups(self) -> int: ...
    @property
    def top_groups(self) -> int: ...
    @property
    def group_score(self) -> str: ...


def route(logits_TE: Tensor, bias_E: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [T, K] int64, weights [T, K], scores [T, E])."""
    scores_TE = logits_TE.sigmoid() if rule.score == "sigmoid" else softmax(logits_TE)
    ids_TK = choose(scores_TE.detach(), bias_E, rule)
    return ids_TK, weigh(scores_TE, logits_TE, ids_TK, rule), scores_TE


def softmax(logits: Tensor) -> Tensor:
    """Over the last dimension; -inf counts as an expert that is out, and a row of them alone is uniform."""
    return logits.clamp(min=torch.finfo(logits.dtype).min).softmax(-1)


def choose(scores_TE: Tensor, bias_E: Tensor | None, rule: Rule) -> Tensor:
    """The chosen experts, int64 [T, K], best first, ties by lower index."""
    selection_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if rule.top_groups < rule.num_groups:
        grouped_TME = selection_TE.unflatten(-1, (rule.num_groups, -1))
        best = min(2 if rule.group_score == "top2" else 1, grouped_TME.shape[-1])
        score_TM = grouped_TME.sort(dim=-1, descending=True).values[..., :best].sum(-1)
        kept_TM = torch.zeros_like(score_TM, dtype=torch.bool)
        kept_TM.scatter_(-1, _top_ids(score_TM, rule.top_groups), True)
        selection_TE = grouped_TME.masked_fill(~kept_TM[..., None], float("-inf")).flatten(-2)
    return _top_ids(selection_TE, rule.top_k)


def weigh(scores_TE: Tensor, logits_TE: Tensor, ids_TK: Tensor, rule: Rule) -> Tensor:
    """The weights [T, K] of the chosen."""
    if rule.score == "softmax_after":
        return softmax(logits_TE.gather(-1, ids_TK)) * rule.route_scale
    weights_TK = scores_TE.gather(-1, ids_TK)
    if rule.renormalize and rule.top_k == 1:
        weights_TK = weights_TK * 0 + 1
    elif rule.renormalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK * rule.route_scale


def _top_ids(scores: Tensor, k: int) -> Tensor:
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
