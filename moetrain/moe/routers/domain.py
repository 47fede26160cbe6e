"""Gates that know a token's domain: its task, its language, or where its text is from.

Shapes: T tokens, B sequences of S, D model, E experts, K top-k, M domains.
Sources: Fan et al. 2022 (M3ViT: a router a task, experts in common), arXiv:2210.14793; Daxberger et al. 2023
(Mobile V-MoEs: one decision an image), arXiv:2309.04354; Zhang et al. 2022 (SkillNet: a task's own experts),
arXiv:2203.03312; Zheng et al. 2024 (Post-MoE: a language's own experts), arXiv:2410.10626.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.bounds import at_least
from moetrain.moe.assign import from_token_choice
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import Router, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import softmax, top_ids
from moetrain.ops.init import Constant, Normal, parameter
from moetrain.ops.linear import wide_linear


class Gate(Enum):
    """``embedding``: one router, whose logits a learnt vector of the domain is added to. ``router``: each
    domain has a router of its own; experts are common."""

    embedding = "embedding"
    router = "router"


class Decision(Enum):
    """``token``: each token by itself. ``sequence``: all tokens of a sequence, or of a document where these
    are told apart, as its first."""

    token = "token"
    sequence = "sequence"


@dataclass(frozen=True)
class DomainOptions(RouterConfig):
    name: str = "domain"
    top_k: Optional[int] = None
    domains: int = field(default=8, metadata=at_least(1, 2**16))  # ids wrap around
    gate: Gate = Gate.embedding
    decision: Decision = Decision.token
    # the experts that a domain may use, one list a domain; null: every domain all of them
    experts: Optional[list[list[int]]] = None
    unknown: int = field(default=0, metadata=at_least(0))  # the domain where none is told, as in generation


@register("domain", DomainOptions, "Fan et al. 2022, arXiv:2210.14793", "k experts of those of a domain")
class DomainRouter(Router):
    """Softmax over the experts that the token's domain may use, of which the k best are taken, with weights
    of sum 1; all of them where a domain has fewer. A domain's vector or router learns from its tokens alone.

    Logits are those before experts of other domains are left out. Raises ValueError for lists of experts
    that are not one a domain, are empty, or name one twice or one that is not there.
    """

    options: DomainOptions
    top_k: int
    reads_bias = True
    allowed_ME: Tensor | None

    def __init__(self, d_model: int, num_experts: int, options: DomainOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)
        if line := _refusal(options, num_experts):
            raise ValueError(line)
        own = options.gate is Gate.router
        routers = options.domains if own else 1
        self.weight_ED = parameter((routers * num_experts, d_model), Normal(d_model**-0.5 * 0.5))
        self.domain_ME = None if own else parameter((options.domains, num_experts), Constant(0.0))

        allowed_ME = None
        if options.experts is not None:
            allowed_ME = torch.zeros(options.domains, num_experts, dtype=torch.bool)
            for domain, experts in enumerate(options.experts):
                allowed_ME[domain, list(experts)] = True
        self.register_buffer("allowed_ME", allowed_ME, persistent=False)

    def products_per_token(self) -> int:
        return int(self.weight_ED.numel())

    def of_domains(self, x_TD: Tensor, domain_T: Tensor) -> Tensor:
        """The logits, [T, E]."""
        logits_TX = wide_linear(x_TD, self.weight_ED)
        if self.domain_ME is not None:
            return logits_TX + F.embedding(domain_T, self.domain_ME.to(logits_TX.dtype))
        logits_TME = logits_TX.view(-1, self.options.domains, self.num_experts)
        own_T11 = domain_T[:, None, None].expand(-1, 1, self.num_experts)
        return logits_TME.gather(1, own_T11).squeeze(1)

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        domain_T = ctx.domain_ids_T
        if domain_T is None:
            domain_T = torch.full_like(ctx.positions_T, self.options.unknown)
        domain_T = domain_T % self.options.domains
        logits_TE = self.of_domains(x_TD, domain_T)
        if self.options.decision is Decision.sequence:
            logits_TE = _of_the_first(logits_TE, ctx)
        allowed_TE = None if self.allowed_ME is None else self.allowed_ME[domain_T]
        scores_TE = softmax(logits_TE if allowed_TE is None else logits_TE.where(allowed_TE, -torch.inf))
        selection_TE = scores_TE.detach() + self.bias_E
        if allowed_TE is None:
            ids_TK = top_ids(selection_TE, self.top_k)
            weights_TK = scores_TE.gather(-1, ids_TK)
        else:
            ids_TK = top_ids(selection_TE.where(allowed_TE, -torch.inf), self.top_k)
            is_allowed_TK = allowed_TE.gather(-1, ids_TK)
            weights_TK = scores_TE.gather(-1, ids_TK) * is_allowed_TK
            ids_TK = ids_TK.where(is_allowed_TK, self.num_experts)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        ragged = allowed_TE is not None
        return from_token_choice(ids_TK, weights_TK, ctx, self.num_experts, scores_TE, logits_TE, ragged)


def _refusal(options: DomainOptions, num_experts: int) -> str | None:
    if options.unknown >= options.domains:
        return f"router.unknown={options.unknown} must be below router.domains={options.domains}"
    if options.experts is None:
        return None
    if len(options.experts) != options.domains:
        return (
            f"router.experts has {len(options.experts)} lists for router.domains={options.domains}: "
            "give one a domain"
        )
    for domain, experts in enumerate(options.experts):
        if not experts or len(set(experts)) < len(experts) or not set(experts) <= set(range(num_experts)):
            return (
                f"router.experts[{domain}]={list(experts)} must name at least one expert, each once, "
                f"from 0 to {num_experts - 1}"
            )
    return None


def _of_the_first(logits_TE: Tensor, ctx: RouterContext) -> Tensor:
    """Each token's row becomes that of the first valid token of its sequence or document."""
    batch, seq = ctx.batch, ctx.seq
    logits_BSE = logits_TE.view(batch, seq, logits_TE.shape[1])
    if ctx.memory is not None:  # generation: one document a row, and the first token may have been before
        return ctx.memory.extend("logits", logits_BSE)[:, :1].expand_as(logits_BSE).reshape(logits_TE.shape)
    place_BS = torch.arange(seq, device=logits_TE.device).repeat(batch, 1)
    run_BS = torch.zeros_like(place_BS)
    if ctx.doc_ids_T is not None and seq:
        doc_BS = ctx.doc_ids_T.view(batch, seq)
        run_BS[:, 1:] = (doc_BS[:, 1:] != doc_BS[:, :-1]).cumsum(1)
    valid_BS = torch.ones_like(run_BS, dtype=torch.bool)
    if ctx.valid_T is not None:
        valid_BS = ctx.valid_T.view(batch, seq)
    first_BR = torch.full_like(place_BS, seq).scatter_reduce(
        1, run_BS, place_BS.where(valid_BS, seq), "amin", include_self=True
    )
    first_BS = first_BR.gather(1, run_BS).minimum(place_BS)  # a run of padding alone has none
    first_BS1 = first_BS[..., None].expand(batch, seq, logits_TE.shape[1])
    return logits_BSE.gather(1, first_BS1).reshape(logits_TE.shape)
