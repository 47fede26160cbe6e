"""Losses that shape the scores themselves: BlockFFN's two on neighbouring tokens.

Shapes: T tokens, B sequences of S positions, E experts, C chunks a sequence.

Each looks at one sequence at a time (a row of the batch, with whatever documents are packed into it) and is a
sum over this micro-batch divided by the valid tokens of the whole step. Sequences are never split, so the
contributions of micro-batches and ranks add up to the loss of the whole batch and to its gradient.

Source: Song et al. 2025, BlockFFN, arXiv:2507.08771.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.bounds import above, at_least
from moetrain.moe.balance.base import Seen, probabilities, register_loss, without_logits
from moetrain.moe.routing import RoutingRecord

_EPS = 1e-5  # keeps the logarithm of 1 - p finite at p = 1, as in the released code


@dataclass(frozen=True)
class LocalityOptions:
    # of the sigmoid that stands for "active"
    steepness: float = field(default=100.0, metadata=above(0))


@register_loss(
    "locality",
    refuses=without_logits,
    options=LocalityOptions,
    what="BlockFFN's: cross entropy of the experts that neighbouring tokens use",
)
def locality(routing: RoutingRecord, seen: Seen[LocalityOptions]) -> Tensor:
    """Activation locality: neighbouring tokens should use the same experts. A scalar without coefficient.

    The mean over experts of the binary cross entropy between ``sigmoid(steepness z_{t-1})`` and the target
    ``sigmoid(steepness z_t)``, summed over pairs of neighbours that are both valid and of one sequence, over
    ``num_tokens``, the valid tokens of the step: a mean over pairs times pairs / tokens. z are the router's
    logits, before any ReLU, and the target has a gradient, both as in the released code.

    Raises ValueError where the router returns no logits.
    """
    if routing.logits_TE is None:
        raise ValueError("this router returns no logits, so it has no locality loss")
    z_BSE = seen.options.steepness * by_sequence(routing.logits_TE, routing)
    pair_BS = F.binary_cross_entropy_with_logits(
        z_BSE[:, :-1], z_BSE[:, 1:].sigmoid(), reduction="none"
    ).mean(-1)
    valid_BS = valid_tokens(routing, z_BSE.shape[1])
    return torch.where(valid_BS[:, :-1] & valid_BS[:, 1:], pair_BS, 0).sum() / seen.num_tokens


@dataclass(frozen=True)
class ChunkOptions:
    chunk_length: int = field(default=64, metadata=at_least(1))  # tokens


@register_loss(
    "chunk_sparsity",
    options=ChunkOptions,
    what="BlockFFN's: mean share of the experts that a run of tokens uses, softly counted",
)
def chunk_sparsity(routing: RoutingRecord, seen: Seen[ChunkOptions]) -> Tensor:
    """Chunk sparsification: few experts in a run of tokens. A scalar in [0, 1] over the step, no coefficient.

    ``1 - prod_t (1 - p_te)`` of an expert and a chunk (``chunk_length`` neighbours of one sequence, of which
    the last may be short) is the probability that the expert is active in it; 0 only where it never is. The
    loss is the mean over experts and, each weighing by its valid tokens over ``num_tokens``, over chunks:
    the step's tokens are known before its first backward, its chunks are not, and whole chunks weigh alike.
    p: scores of sum 1 a token, 0 where padded, so that padding multiplies by exactly 1. For that, p
    shrinks by 1e-5 where the released code adds 1e-5 to 1 - p, which makes idle chunks negative.
    """
    chunk_length = seen.options.chunk_length
    log_BSE = torch.log1p((_EPS - 1) * by_sequence(probabilities(routing), routing))
    batch, seq, num_experts = log_BSE.shape
    missing, chunks = -seq % chunk_length, -(-seq // chunk_length)
    log_BCE = F.pad(log_BSE, (0, 0, 0, missing)).view(batch, chunks, chunk_length, num_experts).sum(2)
    tokens_BC = F.pad(valid_tokens(routing, seq), (0, missing)).view(batch, chunks, chunk_length).sum(2)
    return -(torch.expm1(log_BCE).mean(-1) * tokens_BC).sum() / seen.num_tokens


def by_sequence(x_TE: Tensor, routing: RoutingRecord) -> Tensor:
    """[B, S, E]."""
    batch = routing.num_tokens_B.shape[0]
    return x_TE.reshape(batch, x_TE.shape[0] // max(batch, 1), x_TE.shape[1])


def valid_tokens(routing: RoutingRecord, seq: int) -> Tensor:
    """Which tokens are no padding, bool [B, S]."""
    batch = routing.num_tokens_B.shape[0]
    if routing.valid_T is not None:
        return routing.valid_T.view(batch, seq)
    return torch.ones(batch, seq, dtype=torch.bool, device=routing.num_tokens_B.device)
