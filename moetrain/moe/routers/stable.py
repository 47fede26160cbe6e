"""StableMoE: a router is learnt, distilled into one of token ids, frozen (Dai et al. 2022, arXiv:2204.08396).

Shapes: T tokens, D model, E experts, V rows of the table of token ids, W width of the distilled router.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.bounds import at_least
from moetrain.moe.assign import from_token_choice
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import first_max
from moetrain.ops.embedding import embedding
from moetrain.ops.init import Initializer, Normal, Orthogonal, parameter

_ROWS = 1024  # of a router without a model around it
_GAIN = 0.1


@dataclass(frozen=True)
class StableOptions(RouterConfig):
    name: str = "stable"
    # the step (from 0) from which on the distilled router routes, and is trained no more
    switch_step: int = field(default=6000, metadata=at_least(0))
    width: int = field(default=50, metadata=at_least(1, 2**24))  # of the distilled router's embedding
    # rows of that embedding, which ids wrap around; null: the model's vocabulary
    vocabulary: Optional[int] = field(default=None, metadata=at_least(1, 2**24))

    def for_vocabulary(self, size: int) -> StableOptions:
        return self if self.vocabulary is not None else replace(self, vocabulary=size)


@register("stable", StableOptions, "Dai et al. 2022, arXiv:2204.08396", "one expert a token")
class StableRouter(LinearRouter):
    """The expert of the largest logit, with weight sigmoid(logit).

    Before ``switch_step`` training takes the logits z = W x, and the distilled router, an inner product of
    the token's own embedding and each expert's, learns to predict the choice: its cross entropy is the
    Routing's penalty. From then on, and in evaluation always, the distilled router chooses, by the token's id
    alone, and its parameters are left as they are; the weight is still sigmoid(z), and W is still trained.
    Scores are the sigmoids of the logits that chose, without a gradient where they are the distilled ones;
    the Routing's logits are z.

    Raises ValueError where the context has no token ids.
    """

    options: StableOptions
    top_k = 1
    reads_bias = True
    has_penalty = True
    freezes = True

    def __init__(self, d_model: int, num_experts: int, options: StableOptions) -> None:
        super().__init__(d_model, num_experts, options)
        rows = _ROWS if options.vocabulary is None else options.vocabulary
        self.words_VW = parameter((rows, options.width), Normal(1.0))
        self.distilled_EW = parameter((num_experts, options.width), Orthogonal(_GAIN))

    @staticmethod
    def first_weights(d_model: int) -> Initializer:
        return Orthogonal(_GAIN)

    def products_per_token(self) -> int:
        return self.num_experts * (self.d_model + self.options.width)

    def frozen(self, step: int) -> tuple[nn.Parameter, ...]:
        return (self.words_VW, self.distilled_EW) if step >= self.options.switch_step else ()

    def distilled_logits(self, ctx: RouterContext, dtype: torch.dtype) -> Tensor:
        """[T, E], of the tokens' ids alone."""
        if ctx.token_ids_T is None:
            raise ValueError("router=stable needs token ids: give the layer a RouterContext with token_ids_T")
        rows_T = ctx.token_ids_T % self.words_VW.shape[0]
        return F.linear(embedding(rows_T, self.words_VW).to(dtype), self.distilled_EW.to(dtype))

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        own_TE = self.logits(x_TD)
        learns = self.training and ctx.step < self.options.switch_step
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            distilled_TE = self.distilled_logits(ctx, own_TE.dtype)
        choosing_TE = own_TE if learns else distilled_TE
        ids_T = first_max(choosing_TE.detach() + self.bias_E)
        weights_T1 = own_TE.gather(-1, ids_T[:, None]).sigmoid()
        scores_TE = choosing_TE.sigmoid()
        routing = from_token_choice(ids_T[:, None], weights_T1, ctx, self.num_experts, scores_TE, own_TE)
        penalty = own_TE.new_zeros(())
        if learns:
            wrong_T = F.cross_entropy(distilled_TE, ids_T, reduction="none")
            if ctx.valid_T is not None:
                wrong_T = wrong_T.where(ctx.valid_T, 0.0)
            penalty = wrong_T.sum() / routing.num_tokens.clamp(min=1)
        return replace(routing, penalty=penalty)
