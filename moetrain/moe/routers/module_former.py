"""ModuleFormer's gate, and its growth: new experts beside old ones that stay (Shen et al. 2023).

Source: arXiv:2306.04640 and the released code's ``top_k_gating`` of type ``mlp``, the default there. Growth
and its regularisation are not in that code, and of the paper only summaries were read: what is held, and the
penalty, are ours.

Shapes: T tokens, D model, H hidden units of the gate, E experts, K top-k, S of them drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.bounds import at_least
from moetrain.moe.assign import from_token_choice
from moetrain.moe.combine import Combine
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import Router, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import softmax, top_ids
from moetrain.ops.held import held_rows, hold
from moetrain.ops.init import Normal, parameter
from moetrain.ops.linear import wide_linear

_SALT = 0xF0F
_LEAST = 1e-6  # added to probabilities that are drawn by, as in the released code


@dataclass(frozen=True)
class ModuleFormerOptions(RouterConfig):
    name: str = "module_former"
    top_k: Optional[int] = None  # null: 2, or 1 where there is one expert
    hidden: int = field(default=256, metadata=at_least(1, 2**24))  # of the gate's network
    sampled: int = field(default=0, metadata=at_least(0))  # of the top_k: drawn by probability, in training
    # the first so many experts are old: the gate's network and their rows stay, and the router's penalty is
    # the mean square of the other rows
    held: int = field(default=0, metadata=at_least(0))

    def combine(self, num_experts: int) -> Combine:
        return Combine.of_softmax(resolve_top_k(self.top_k, num_experts), num_experts, self.drops)


@register("module_former", ModuleFormerOptions, "Shen et al. 2023, arXiv:2306.04640", "k experts a token")
class ModuleFormerRouter(Router):
    """p = softmax(W gelu(V x + b)); a token's k best experts, each weighed by its p.

    With ``sampled`` = S, training takes the k - S best and draws S of the others without replacement, by
    p + 1e-6. First weights have the variances of torch's ``nn.Linear``, which the code draws uniformly; its
    dropout within the gate, 0 there, is not here. Raises ValueError where S exceeds k, and ``held`` leaves
    no expert to be trained.
    """

    options: ModuleFormerOptions
    top_k: int
    replays = True

    def __init__(self, d_model: int, num_experts: int, options: ModuleFormerOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)
        if options.sampled > self.top_k:
            raise ValueError(f"router.sampled={options.sampled} exceeds router.top_k={self.top_k}: lower it")
        if options.held and options.held >= num_experts:
            raise ValueError(
                f"router.held={options.held} holds all of num_experts={num_experts}: lower it, or freeze the "
                "router by optim.frozen"
            )
        first, second = Normal((3 * d_model) ** -0.5), Normal((3 * options.hidden) ** -0.5)
        self.hidden_HD = parameter((options.hidden, d_model), first)
        self.hidden_bias_H = parameter((options.hidden,), first)
        self.weight_EH = parameter((num_experts, options.hidden), second)
        if options.held:
            self.has_penalty = True
            self.hidden_HD.requires_grad_(False)
            self.hidden_bias_H.requires_grad_(False)
            hold(self.weight_EH)

    def rows_ED(self) -> Tensor | None:
        return self.weight_EH

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, E]."""
        hidden_TH = F.gelu(wide_linear(x_TD, self.hidden_HD) + self.hidden_bias_H)
        return wide_linear(hidden_TH, held_rows(self.weight_EH, self.options.held))

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = softmax(logits_TE)
        ids_TK = self._ids(scores_TE.detach(), ctx) if ctx.forced_TK is None else ctx.forced_TK
        weights_TK = scores_TE.gather(-1, ids_TK)
        routing = from_token_choice(ids_TK, weights_TK, ctx, self.num_experts, scores_TE, logits_TE)
        if not self.options.held:
            return routing
        return replace(routing, penalty=self.weight_EH[self.options.held :].square().mean())

    def _ids(self, scores_TE: Tensor, ctx: RouterContext) -> Tensor:
        sampled = self.options.sampled if self.training else 0
        if not sampled:
            return top_ids(scores_TE, self.top_k)
        best_TK = top_ids(scores_TE, self.top_k - sampled)
        # the largest of log p plus Gumbel noise are draws by p without replacement
        noise_TE = ctx.uniform(tuple(scores_TE.shape), _SALT).to(scores_TE.dtype)
        keys_TE = torch.log(scores_TE + _LEAST) - torch.log(-torch.log(noise_TE))
        drawn_TS = top_ids(keys_TE.scatter(-1, best_TK, float("-inf")), sampled)
        return torch.cat([best_TK, drawn_TS], dim=-1)
