"""The rules of routing in evaluation, by the words of a decoder's config (``routing``).

Shapes: T tokens, E experts, k experts a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Norms, rotations and routing are computed in fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def best(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest, best first, ties by the lower index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


# Each is (router, logits_TE) -> weights_TE, 0 where a token does not take the expert.


def choice(router: Any, logits_TE: Tensor) -> Tensor:
    """The k best experts of each token."""
    o = router.rule
    scores_TE = logits_TE.sigmoid() if o["score"] == "sigmoid" else logits_TE.softmax(-1)
    selections = {"logits": logits_TE, "scores": scores_TE, "biased_scores": scores_TE + router.bias_E}
    selection_TE = selections[o["select"]]
    if o["num_groups"] > 1:
        selection_TE = within_groups(selection_TE, o)
    ids_Tk = best(selection_TE, o["top_k"])
    weights_Tk = scores_TE.gather(-1, ids_Tk)
    if o["weights"] == "softmax":
        weights_Tk = logits_TE.gather(-1, ids_Tk).softmax(-1)
    elif o["weights"] == "equal":
        weights_Tk = torch.full_like(weights_Tk, 1 / o["top_k"])
    elif o["weights"] == "sum_to_1":
        weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdim=True) + 1e-20)
    if o["margin"] is not None:  # others than the first only where that one is not sure
        weights_Tk = weights_Tk.masked_fill(weights_Tk[:, :1] - weights_Tk > o["margin"], 0.0)
    if o["threshold"] is not None:  # others than the first only while those before sum to less
        before_Tk = weights_Tk.cumsum(-1) - weights_Tk
        before_Tk[:, 0] = -1.0
        weights_Tk = weights_Tk.masked_fill(before_Tk >= o["threshold"], 0.0)
    return torch.zeros_like(logits_TE).scatter(-1, ids_Tk, weights_Tk * o["route_scale"])


def within_groups(selection_TE: Tensor, o: dict[str, Any]) -> Tensor:
    """-inf outside the best groups of experts, or but for the best experts of each group."""
    grouped = selection_TE.unflatten(-1, (o["num_groups"], -1))
    if o["per_group"]:
        kept = torch.zeros_like(grouped).scatter(-1, best(grouped, o["per_group"]), 1)
    else:
        score = grouped.topk(min(o["group_best"], grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(score).scatter(-1, best(score, o["top_groups"]), 1)[..., None]
    return grouped.masked_fill(kept == 0, -torch.inf).flatten(-2)


def blockffn(router: Any, logits_TE: Tensor) -> Tensor:
    scores_TE = logits_TE.relu()
    size_T1 = (scores_TE.square().mean(-1, keepdim=True) + router.rule["eps"]).rsqrt()
    return scores_TE * size_T1 * wide(router.scale_E)


def expert_choice(router: Any, logits_TE: Tensor) -> Tensor:
    """An expert takes the tokens that reach its threshold, which training has set."""
    p_TE = logits_TE.softmax(-1)
    return p_TE.masked_fill(p_TE < router.threshold_E, 0.0)


RULES = {"choice": choice, "blockffn": blockffn, "expert_choice": expert_choice}
RULES["relu"] = lambda router, logits_TE: logits_TE.relu()
