"""Each token's best experts and their weights, from logits: by one kernel on a GPU, else by torch.

Shapes: T tokens, E experts, K chosen, M groups of experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.kernels.router.rule import Rule
from moetrain.moe.topk_ops import softmax, top_ids
from moetrain.ops import self_test
from moetrain.ops.kernel_or_torch import Step


class Chosen(NamedTuple):
    """``ids_TK``: int64, best first, ties by lower index. The weights and scores are differentiable."""

    ids_TK: Tensor
    weights_TK: Tensor
    scores_TE: Tensor


def choose_experts(logits_TE: Tensor, bias_E: Tensor, rule: Rule, backend: str) -> Chosen:
    """The choice by ``rule``, in which ``bias_E`` takes part and in nothing else.

    ``backend``: ``experts.backend``, which says whether ``kernels/router`` may compute it. In a traced layer
    it may not: the compiler fuses torch's operators itself.
    """
    case = (rule, logits_TE.shape[1], logits_TE.dtype)
    if not torch.compiler.is_compiling() and _STEP.by_kernel(backend, logits_TE.device, case):
        return _by_kernel(logits_TE, bias_E, rule)
    return _by_torch(logits_TE, bias_E, rule)


def _by_kernel(logits_TE: Tensor, bias_E: Tensor, rule: Rule) -> Chosen:
    from moetrain.kernels.router.route import route

    return Chosen(*route(logits_TE, bias_E, rule))


def _by_torch(logits_TE: Tensor, bias_E: Tensor, rule: Rule) -> Chosen:
    scores_TE = scores(logits_TE, rule)
    ids_TK = select(scores_TE.detach(), bias_E, rule)
    return Chosen(ids_TK, weigh(scores_TE, logits_TE, ids_TK, rule), scores_TE)


def choose_given(logits_TE: Tensor, ids_TK: Tensor, rule: Rule) -> Chosen:
    """The given experts with their weights by ``rule``; by torch, whatever chose them."""
    scores_TE = scores(logits_TE, rule)
    return Chosen(ids_TK, weigh(scores_TE, logits_TE, ids_TK, rule), scores_TE)


def scores(logits_TE: Tensor, rule: Rule) -> Tensor:
    """The scores [T, E]."""
    return logits_TE.sigmoid() if rule.score == "sigmoid" else softmax(logits_TE)


def select(scores_TE: Tensor, bias_E: Tensor, rule: Rule) -> Tensor:
    """The chosen experts, int64 [T, K]; the bias takes part here and nowhere else."""
    selection_TE = scores_TE + bias_E
    return top_ids(_limited_to_groups(selection_TE, rule) if rule.limited else selection_TE, rule.top_k)


def _limited_to_groups(selection_TE: Tensor, rule: Rule) -> Tensor:
    """-inf outside each token's best groups: 0 would beat real scores under a negative bias."""
    grouped_TME = selection_TE.unflatten(-1, (rule.num_groups, -1))
    best = 2 if rule.group_score == "top2" else 1
    score_TM = grouped_TME.topk(min(best, grouped_TME.shape[-1]), dim=-1).values.sum(-1)
    kept_TM = torch.zeros_like(score_TM, dtype=torch.bool)
    kept_TM.scatter_(-1, top_ids(score_TM, rule.top_groups), True)
    limited_TME: Tensor = grouped_TME.masked_fill(~kept_TM[..., None], float("-inf"))
    return limited_TME.flatten(-2)


def weigh(scores_TE: Tensor, logits_TE: Tensor, ids_TK: Tensor, rule: Rule) -> Tensor:
    """The weights [T, K] of the chosen."""
    if rule.score == "softmax_after":
        weights_TK = softmax(logits_TE.gather(-1, ids_TK))
    else:
        weights_TK = scores_TE.gather(-1, ids_TK)
        if rule.renormalize and rule.top_k == 1:
            weights_TK = weights_TK * 0 + 1  # the quotient's gradient would be rounding noise, not zero
        elif rule.renormalize:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK * rule.route_scale if rule.route_scale != 1.0 else weights_TK


_Case = tuple[Rule, int, torch.dtype]
_TOKENS = 37


def _refusal(case: _Case) -> str | None:
    rule, num_experts, dtype = case
    if dtype is not torch.float32:
        return f"the router's kernels take logits in fp32, not {dtype}"
    try:
        rule.check(num_experts)
    except ValueError as error:
        return str(error)
    return None


def _failure(device: torch.device, case: _Case) -> str | None:
    """The kernel on logits with ties and a bias: its choice by its own scores, and the rest in fp64."""
    rule, num_experts, _ = case
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randint(-6, 7, (_TOKENS, num_experts), generator=generator) * 0.5
    bias_E = torch.randint(-3, 4, (num_experts,), generator=generator) * 0.25
    cotangents = [torch.randn(_TOKENS, n, generator=generator) for n in (rule.top_k, num_experts)]
    ours_TE = logits_TE.to(device).requires_grad_()
    ids_TK, *ours = _by_kernel(ours_TE, bias_E.to(device), rule)
    (dlogits_TE,) = torch.autograd.grad(ours, ours_TE, [c.to(device) for c in cotangents])
    ids_TK = ids_TK.cpu()
    if not torch.equal(ids_TK, select(ours[1].detach().cpu(), bias_E, rule)):
        return "it chose other experts than the best in a self-test"
    wide_TE = logits_TE.double().requires_grad_()
    scores_TE = scores(wide_TE, rule)
    right = [weigh(scores_TE, wide_TE, ids_TK, rule), scores_TE]
    (wanted_TE,) = torch.autograd.grad(right, wide_TE, [c.double() for c in cotangents])
    names = ("weight", "score", "gradient of the logits")
    found = zip(names, (*ours, dlogits_TE), (*(t.detach() for t in right), wanted_TE), strict=True)
    for name, value, wanted in found:
        if line := self_test.off(name, value, wanted, torch.float32):
            return line
    return None


_STEP = Step("the router's choice", _refusal, _failure)
