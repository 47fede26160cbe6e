"""The router as a differentiable function of its logits.

Shapes: T tokens, E experts, K chosen.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from ..specimen import Specimen, pointer
from ..tiles import Arch
from .backward import backward_kernel
from .forward import forward_kernel
from .rule import GROUP_SCORES, MOST_EXPERTS, SCORES, Rule

_TILE = 2048  # scores that one program holds
_WARPS = 4


def route(logits_TE: Tensor, bias_E: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [T, K] int64, weights [T, K], scores [T, E]) of fp32 logits, best first, ties by lower index.

    ``bias_E`` is added to the scores for the choice only. Differentiable by the weights and the scores. NaN
    counts as the largest score. Raises ValueError for logits that are not fp32, and numbers that do not fit.
    """
    for name, given in (("logits", logits_TE), ("bias", bias_E)):
        if given is not None and given.dtype is not torch.float32:
            raise ValueError(f"the router's kernels take {name} in fp32, not {given.dtype}")
    experts = logits_TE.shape[1]
    rule.check(experts)
    if bias_E is not None and tuple(bias_E.shape) != (experts,):
        raise ValueError(f"the bias has shape {tuple(bias_E.shape)}, {experts} experts need ({experts},)")
    return _Route.apply(logits_TE, bias_E, rule)  # type: ignore[no-any-return, no-untyped-call]


class _Route(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, logits_TE: Tensor, bias_E: Tensor | None, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = logits_TE.contiguous()
        tokens, experts = logits_TE.shape
        ids_TK = torch.empty(tokens, rule.top_k, dtype=torch.int64, device=logits_TE.device)
        weights_TK, scores_TE = logits_TE.new_empty(tokens, rule.top_k), torch.empty_like(logits_TE)
        options = forward_constants(rule, experts, bias_E is not None)
        bias = logits_TE if bias_E is None else bias_E.contiguous()  # a pointer that is not read
        if tokens:
            with _on(logits_TE):
                forward_kernel[(triton.cdiv(tokens, options["BLOCK_T"]),)](
                    logits_TE, bias, ids_TK, weights_TK, scores_TE, tokens, experts, rule.route_scale,
                    **options, num_warps=_WARPS, num_stages=1,
                )  # fmt: skip
        ctx.mark_non_differentiable(ids_TK)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits_TE, ids_TK)
        ctx.rule = rule  # type: ignore[attr-defined]
        return ids_TK, weights_TK, scores_TE

    @staticmethod
    def backward(
        ctx: FunctionCtx, dids: None, dweights_TK: Tensor | None, dscores_TE: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        logits_TE, ids_TK = ctx.saved_tensors  # type: ignore[attr-defined]
        rule: Rule = ctx.rule  # type: ignore[attr-defined]
        if dweights_TK is None and dscores_TE is None:
            return None, None, None
        tokens, experts = logits_TE.shape
        dlogits_TE = torch.empty_like(logits_TE)
        options = backward_constants(rule, experts, dweights_TK is not None, dscores_TE is not None)
        # a pointer that is not read stands for a gradient that is missing
        dweights = logits_TE if dweights_TK is None else dweights_TK.contiguous()
        dscores = logits_TE if dscores_TE is None else dscores_TE.contiguous()
        if tokens:
            with _on(logits_TE):
                backward_kernel[(triton.cdiv(tokens, options["BLOCK_T"]),)](
                    dlogits_TE, dweights, dscores, logits_TE, ids_TK, tokens, experts, rule.route_scale,
                    **options, num_warps=_WARPS, num_stages=1,
                )  # fmt: skip
        return dlogits_TE, None, None


def forward_constants(rule: Rule, experts: int, has_bias: bool) -> dict[str, int]:
    """The constants of ``forward_kernel``."""
    return _constants(rule, experts) | {
        "BLOCK_M": triton.next_power_of_2(rule.num_groups), "HAS_BIAS": has_bias, "GROUPS": rule.num_groups,
        "SIZE": experts // rule.num_groups, "TOP_GROUPS": rule.top_groups, "TOP2": rule.group_score == "top2",
    }  # fmt: skip


def backward_constants(rule: Rule, experts: int, has_dweights: bool, has_dscores: bool) -> dict[str, int]:
    """The constants of ``backward_kernel``."""
    return _constants(rule, experts) | {"HAS_DWEIGHTS": has_dweights, "HAS_DSCORES": has_dscores}


def _constants(rule: Rule, experts: int) -> dict[str, int]:
    wide = triton.next_power_of_2(experts)
    return {
        "BLOCK_T": max(1, min(64, _TILE // wide)), "BLOCK_E": wide,
        "BLOCK_K": triton.next_power_of_2(rule.top_k), "TOP_K": rule.top_k,
        "SIGMOID": rule.score == "sigmoid", "AFTER": rule.score == "softmax_after",
        "RENORMALIZE": rule.renormalize,
    }  # fmt: skip


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """A context whose current device is the tensor's, which Triton launches on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def specimens(arch: Arch) -> list[Specimen]:
    """Both kernels with each score, without groups and with them, for 128, 256 and 512 experts."""
    fp32, index = pointer(torch.float32), pointer(torch.int64)
    numbers = {"tokens": "i32", "experts": "i32", "route_scale": "fp32"}
    forward = dict.fromkeys(("logits", "bias", "weights", "scores"), fp32) | {"ids": index} | numbers
    backward = dict.fromkeys(("dlogits", "dweights", "dscores", "logits"), fp32) | {"ids": index} | numbers
    found = []
    for experts, top_k, groups in ((128, 8, 1), (256, 8, 8), (MOST_EXPERTS, 32, 16)):
        for score in SCORES:
            rule = Rule(
                top_k, score, num_groups=groups, top_groups=-(-groups // 2), group_score=GROUP_SCORES[0]
            )
            name = f"{experts} experts, {top_k} a token, {groups} groups, {score}"
            constants = forward_constants(rule, experts, True)
            found.append(Specimen(f"forward {name}", forward_kernel, forward, constants, _WARPS, 1, False))
            constants = backward_constants(rule, experts, True, True)
            found.append(Specimen(f"backward {name}", backward_kernel, backward, constants, _WARPS, 1, False))
    return found
