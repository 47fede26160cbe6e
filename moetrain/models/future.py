"""Layers that predict tokens further ahead (DeepSeek-AI 2024, arXiv:2412.19437, section 2.2).

Layer k reads, at place i, the hidden state that layer k - 1 (of the first: the decoder) has made of place i,
beside the embedding of the token k places on; what it makes predicts the token after that one, by the
decoder's own output matrix. The order, embedding first, and the state's being normalised already are those
of the released weights: the paper's equation 21 has the state first.

Shapes: B batch, S sequence, D model, C = 2 D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from moetrain.models.block import Block, BlockOutput, Carried
from moetrain.models.loss import IGNORED, cross_entropy_sum
from moetrain.models.norm import RMSNorm
from moetrain.models.options import ModelConfig
from moetrain.models.rope import Rope
from moetrain.moe import RouterContext
from moetrain.moe.options import ExpertsConfig, RouterConfig
from moetrain.ops.attention import Plan
from moetrain.ops.init import Normal, parameter
from moetrain.ops.low_rank import linear_beside


class Join(nn.Module):
    """W [norm(token); norm(hidden)], with a norm for each of the two."""

    takes_low_rank = ("w_join_DC",)

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.token_norm, self.hidden_norm = (
            RMSNorm(cfg.d_model, cfg.norm_eps, cfg.zero_centered_norms) for _ in range(2)
        )
        self.w_join_DC = parameter((cfg.d_model, 2 * cfg.d_model), Normal(cfg.init_std))

    def forward(self, hidden_BSD: Tensor, token_BSD: Tensor) -> Tensor:
        pair_BSC = torch.cat([self.token_norm(token_BSD), self.hidden_norm(hidden_BSD)], -1)
        return linear_beside(pair_BSC, self, "w_join_DC")


class FutureBlock(Block):
    """A whole block over what :class:`Join` makes of two streams; then its own norm, where it has one."""

    def __init__(self, cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> None:
        super().__init__(cfg, router, experts, layer)
        self.join = Join(cfg)
        shared = cfg.future.shared_norm
        self.norm = None if shared else RMSNorm(cfg.d_model, cfg.norm_eps, cfg.zero_centered_norms)

    def forward(  # type: ignore[override]
        self, hidden_BSD: Tensor, token_BSD: Tensor, rope: Rope, plan: Plan, ctx: RouterContext
    ) -> BlockOutput:
        """``token_BSD``: the embedding that belongs to each state. The stream is in the state's dtype."""
        x_BSD = self.join(hidden_BSD, token_BSD).to(hidden_BSD.dtype)
        x_BSD, record, carried = super().forward(x_BSD, rope, plan, ctx, None, Carried())
        return BlockOutput(x_BSD if self.norm is None else self.norm(x_BSD), record, carried)


def is_join(name: str) -> bool:
    """Whether a tensor of this name belongs to a layer that predicts further tokens, to a :class:`Join`."""
    return ".join." in name


def shifted(x_BSX: Tensor, depth: int) -> Tensor:
    """What stands ``depth`` places on; at the last places, where nothing does, anything."""
    return x_BSX.roll(-depth, 1)


def known(
    depth: int, seq: int, valid_BS: Tensor | None, doc_ids_BS: Tensor | None, device: torch.device
) -> Tensor:
    """[B or 1, S], bool: the places i for which i + 1 to i + ``depth`` hold tokens of i's own document.

    ``valid_BS``: False on padding; None: there is none. ``doc_ids_BS``: None: nothing divides a row.
    """
    known_BS = (torch.arange(seq, device=device) < seq - depth)[None]
    for ahead in range(depth + 1):
        if valid_BS is not None:
            known_BS = known_BS & shifted(valid_BS, ahead)
        if doc_ids_BS is not None and ahead:
            known_BS = known_BS & (shifted(doc_ids_BS, ahead) == doc_ids_BS)
    return known_BS


def labels_ahead(depth: int, labels_BS: Tensor, valid_BS: Tensor | None, doc_ids_BS: Tensor | None) -> Tensor:
    """What layer ``depth`` (from 1) is to predict at each place; IGNORED: nothing.

    That is the label ``depth`` places on, where all tokens up to it are of one document. So a target beyond a
    document's or a row's end does not count, and one that does not train itself does not either.
    """
    known_BS = known(depth, labels_BS.shape[1], valid_BS, doc_ids_BS, labels_BS.device)
    return shifted(labels_BS, depth).where(known_BS, IGNORED)


def nll_sums(
    states: Sequence[Tensor],
    head_weight_VD: Tensor,
    labels_BS: Tensor,
    valid_BS: Tensor | None,
    doc_ids_BS: Tensor | None,
) -> tuple[Tensor, ...]:
    """Of each layer's hidden states, the sum of -log p in nats over what it is to predict."""
    return tuple(
        cross_entropy_sum(state_BSD, head_weight_VD, labels_ahead(depth, labels_BS, valid_BS, doc_ids_BS))[0]
        for depth, state_BSD in enumerate(states, 1)
    )


def context_ahead(ctx: RouterContext, depth: int, doc_ids_BS: Tensor | None) -> RouterContext:
    """What routers see in layer ``depth``: places without a known token count as padding."""
    shape = (ctx.batch, ctx.seq)
    valid_BS = None if ctx.valid_T is None else ctx.valid_T.view(shape)
    known_BS = known(depth, ctx.seq, valid_BS, doc_ids_BS, ctx.sample_ids_B.device)
    token_ids_T = ctx.token_ids_T
    if token_ids_T is not None:
        token_ids_T = shifted(token_ids_T.view(shape), depth).reshape(-1)
    return replace(ctx, valid_T=known_BS.expand(shape).reshape(-1), token_ids_T=token_ids_T)
