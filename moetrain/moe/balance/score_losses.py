"""Losses that shape the scores themselves: BlockFFN's two on neighbouring tokens, and a Dirichlet prior.

Shapes: T tokens, B sequences of S positions, E experts, C chunks a sequence.

Each looks at one sequence at a time (a row of the batch, with whatever documents are packed into it) and is a
sum over this micro-batch divided by the valid tokens of the whole step. Sequences are never split, so the
contributions of micro-batches and ranks add up to the loss of the whole batch and to its gradient; only
``dirichlet`` over a micro-batch depends on the micro-batch.

Sources: Song et al. 2025, BlockFFN, arXiv:2507.08771 (locality, chunk_sparsity); Mirvakhabova et al. 2025,
"Dirichlet-Prior Shaping", arXiv:2510.01185 (dirichlet).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.bounds import above, at_least
from moetrain.moe.balance.base import Seen, probabilities, register_loss, without_logits
from moetrain.moe.routing import RoutingRecord

_EPS = 1e-5  # keeps the logarithm of 1 - p finite at p = 1, as in the released code
_MAX_TERMS = 1000  # of the continued fraction, which converges in O(sqrt(max(a, b)))


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
    z_BSE = seen.options.steepness * _by_sequence(routing.logits_TE, routing)
    pair_BS = F.binary_cross_entropy_with_logits(
        z_BSE[:, :-1], z_BSE[:, 1:].sigmoid(), reduction="none"
    ).mean(-1)
    valid_BS = _valid(routing, z_BSE.shape[1])
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
    log_BSE = torch.log1p((_EPS - 1) * _by_sequence(probabilities(routing), routing))
    batch, seq, num_experts = log_BSE.shape
    missing, chunks = -seq % chunk_length, -(-seq // chunk_length)
    log_BCE = F.pad(log_BSE, (0, 0, 0, missing)).view(batch, chunks, chunk_length, num_experts).sum(2)
    tokens_BC = F.pad(_valid(routing, seq), (0, missing)).view(batch, chunks, chunk_length).sum(2)
    return -(torch.expm1(log_BCE).mean(-1) * tokens_BC).sum() / seen.num_tokens


@dataclass(frozen=True)
class DirichletOptions:
    # each expert's concentration in the prior
    alpha: float = field(default=1.0, metadata=above(0))
    # the gradient takes the prior's density between these, since it may be 0 or infinite
    least_density: float = field(default=1e-3, metadata=at_least(0))
    most_density: float = field(default=100.0, metadata=above(0))


@register_loss(
    "dirichlet",
    options=DirichletOptions,
    scopes=("sequence", "micro"),
    at_balance="0",
    what="squared distance of the scores' distribution from a symmetric Dirichlet prior's",
)
def dirichlet(routing: RoutingRecord, seen: Seen[DirichletOptions]) -> Tensor:
    """Distance of the scores from draws of a symmetric Dirichlet prior. A scalar without coefficient.

    Under Dirichlet(alpha, ..., alpha) each expert's p is Beta(alpha, (E - 1) alpha) distributed. Of n tokens'
    p in ascending order, the i-th should lie at the quantile i / (n + 1): the loss is the mean over tokens
    and experts of ``(i / (n + 1) - F(p_(i)))^2``, F the Beta distribution's CDF; about 1 / (6 n) for draws of
    the prior. The order is of each sequence's tokens (``sequence``: weighed by its valid tokens over
    ``num_tokens``) or of the micro-batch's (``micro``); no other scope is offered, since a part of the batch
    does not know the order in the whole. The loss of a single expert is 0, without gradient.
    """
    p_TE, alpha = probabilities(routing), seen.options.alpha
    num_experts = p_TE.shape[-1]
    if num_experts == 1:
        return p_TE.sum() * 0
    p_BSE = _by_sequence(p_TE, routing)
    valid_BS = _valid(routing, p_BSE.shape[1])
    if seen.scope == "micro":
        p_BSE, valid_BS = p_BSE.reshape(1, -1, num_experts), valid_BS.reshape(1, -1)
    p_BSE = torch.where(valid_BS[..., None], p_BSE, 2).sort(dim=1, stable=True).values  # padding comes last
    rank_S = torch.arange(1, p_BSE.shape[1] + 1, device=p_BSE.device, dtype=p_BSE.dtype)
    tokens_B1 = valid_BS.sum(1, keepdim=True)
    quantile_BS = rank_S / (tokens_B1 + 1)
    clip = seen.options.least_density, seen.options.most_density
    cdf_BSE = beta_cdf(p_BSE, alpha, (num_experts - 1) * alpha, clip)
    square_BS = (quantile_BS[..., None] - cdf_BSE).square().mean(-1)
    return torch.where(rank_S <= tokens_B1, square_BS, 0).sum() / seen.num_tokens


def beta_cdf(x: Tensor, a: float, b: float, clip: tuple[float, float] = (0.0, math.inf)) -> Tensor:
    """The CDF of Beta(a, b) at ``x``, of any shape; its gradient is the density, and 0 outside of (0, 1).

    ``clip``: the least and the largest density that the gradient takes (0.001 and 100 in the batch-shaping
    of Ehteshami Bejnordi et al. 2020, arXiv:1907.06627).

    At 0 and 1 the density may be infinite; a score there (an idle expert's) cannot move anyway.
    """
    with torch.no_grad():
        kind = torch.finfo(x.dtype)
        log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        y = x.clamp(kind.tiny, 1 - kind.eps / 2).double()  # where the density is finite
        density = torch.exp((a - 1) * y.log() + (b - 1) * torch.log1p(-y) - log_beta).to(x.dtype)
        slope = torch.where((x > 0) & (x < 1), density.clamp(*clip), 0)
        value = _incomplete_beta(x.double().clamp(0, 1), a, b, log_beta, max(kind.eps / 1e3, 1e-15)).to(
            x.dtype
        )
    return value + slope * (x - x.detach())  # the last factor is 0 and has the gradient 1


def _incomplete_beta(x: Tensor, a: float, b: float, log_beta: float, accuracy: float) -> Tensor:
    """I_x(a, b), fp64, by Lentz's evaluation of its continued fraction (DLMF 8.17.22)."""
    turn = x > (a + 1) / (a + b + 2)  # beyond, 1 - I_{1-x}(b, a) converges faster
    y = torch.where(turn, 1 - x, x)
    a64, b64 = x.new_tensor(a), x.new_tensor(b)  # of two Python numbers, where would make fp32
    a_y, b_y = torch.where(turn, b64, a64), torch.where(turn, a64, b64)
    front = torch.exp(torch.xlogy(a_y, y) + torch.special.xlog1py(b_y, -y) - log_beta) / a_y
    c, d, fraction = torch.ones_like(y), torch.zeros_like(y), torch.ones_like(y)
    for n in range(1, _MAX_TERMS):
        m = n // 2
        term = (a_y + m).mul_(a_y + b_y + m).neg_() if n % 2 else (b_y - m).mul_(m)
        term.mul_(y).div_((a_y + (n - 1)).mul_(a_y + n))
        d.mul_(term).add_(1).reciprocal_()
        c = term.div_(c).add_(1)
        factor = c * d
        fraction.mul_(factor)
        if bool((factor.sub_(1).abs_() < accuracy).all()):
            break
    value = front / fraction
    return torch.where(turn, 1 - value, value)


def _by_sequence(x_TE: Tensor, routing: RoutingRecord) -> Tensor:
    """[B, S, E]."""
    batch = routing.num_tokens_B.shape[0]
    return x_TE.reshape(batch, x_TE.shape[0] // max(batch, 1), x_TE.shape[1])


def _valid(routing: RoutingRecord, seq: int) -> Tensor:
    """Which tokens are no padding, bool [B, S]."""
    batch = routing.num_tokens_B.shape[0]
    if routing.valid_T is not None:
        return routing.valid_T.view(batch, seq)
    return torch.ones(batch, seq, dtype=torch.bool, device=routing.num_tokens_B.device)
