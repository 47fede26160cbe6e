"""The scores' distance from draws of a Dirichlet prior, of all tokens or of each domain's own.

A sequence is looked at by itself, and never split, so that contributions of micro-batches and ranks add up;
the scope ``micro`` depends on the micro-batch.

Sources: Mirvakhabova et al. 2025, "Dirichlet-Prior Shaping", arXiv:2510.01185. Written from the paper's
equations as restated by others, and the clip of the batch-shaping that it follows (arXiv:1907.06627); the
authors' code was not read.

Shapes: B sequences of S positions, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Optional, Union

import torch
from torch import Tensor

from moetrain.bounds import above, at_least
from moetrain.errors import shortened
from moetrain.moe.balance.base import Seen, probabilities, register_loss
from moetrain.moe.balance.score_losses import by_sequence, valid_tokens
from moetrain.moe.routers import Router
from moetrain.moe.routing import RoutingRecord

_MAX_TERMS = 1000  # of the continued fraction, which converges in O(sqrt(max(a, b)))


@dataclass(frozen=True)
class DirichletOptions:
    # concentration in the prior: one number for all experts, or a list, an expert's each
    alpha: Union[float, list[float]] = field(default=1.0, metadata=above(0))
    # the gradient takes the prior's density between these, since it may be 0 or infinite
    least_density: float = field(default=1e-3, metadata=at_least(0))
    most_density: float = field(default=100.0, metadata=above(0))
    # lists as alpha may be, for the tokens of the corpus's first domains; null: alpha is of all
    by_domain: Optional[list[list[float]]] = field(default=None, metadata=above(0))

    def __post_init__(self) -> None:
        if type(self.alpha) not in (int, float) and not _is_list(self.alpha):
            raise ValueError(f"alpha is a number or a list of numbers, not {shortened(repr(self.alpha))}")
        rows = self.by_domain
        if rows is not None and not (isinstance(rows, list) and rows and all(map(_is_list, rows))):
            raise ValueError(f"by_domain is a list of lists of numbers, not {shortened(repr(rows))}")

    def priors(self, num_experts: int, device: torch.device) -> list[Tensor]:
        """fp64 [E] each: ``by_domain``'s, and last that of ``alpha``."""
        alpha = self.alpha if isinstance(self.alpha, list) else [self.alpha] * num_experts
        rows = [*(self.by_domain or []), alpha]
        return [torch.tensor(row, dtype=torch.float64, device=device) for row in rows]


def _is_list(row: object) -> bool:
    return isinstance(row, list) and bool(row) and all(type(x) in (int, float) for x in row)


def _fits(options: DirichletOptions, router: Router) -> str | None:
    rows = [("alpha", options.alpha), *(("by_domain", row) for row in options.by_domain or [])]
    for key, row in rows:
        if isinstance(row, list) and len(row) != router.num_experts:
            return f"has {router.num_experts} experts, but options.{key} lists {len(row)}"
    return None


@register_loss(
    "dirichlet",
    options=DirichletOptions,
    scopes=("sequence", "micro"),
    fits=_fits,
    at_balance="0",
    what="squared distance of the scores' distribution from a Dirichlet prior's, which may be a domain's own",
)
def dirichlet(routing: RoutingRecord, seen: Seen[DirichletOptions]) -> Tensor:
    """Distance of the scores from draws of Dirichlet(alpha_1, ..., alpha_E). A scalar without coefficient.

    Under the prior expert e's p is Beta(alpha_e, sum of the others) distributed. Of n tokens' p in ascending
    order, the i-th should lie at the quantile i / (n + 1): the loss is the mean over tokens and experts of
    ``(i / (n + 1) - F(p_(i)))^2``, F the Beta distribution's CDF; about 1 / (6 n) for draws of the prior. The
    order is of each sequence's tokens (``sequence``: weighed by its valid tokens over ``num_tokens``) or of
    the micro-batch's (``micro``); no other scope is offered, since a part of the batch does not know the
    order in the whole. With ``by_domain`` it is of those of one prior among these tokens. The loss of a
    single expert is 0, without gradient.

    Raises ValueError where ``by_domain`` is given and the tokens' domains are not known.
    """
    p_TE, options = probabilities(routing), seen.options
    num_experts = p_TE.shape[-1]
    if num_experts == 1:
        return p_TE.sum() * 0
    p_BSE = by_sequence(p_TE, routing)
    clip, total = (options.least_density, options.most_density), p_TE.sum() * 0
    for alpha_E, mask_BS in _groups(routing, options, p_BSE):
        own_BSE = p_BSE
        if seen.scope == "micro":
            own_BSE, mask_BS = p_BSE.reshape(1, -1, num_experts), mask_BS.reshape(1, -1)
        total = total + _distance(own_BSE, mask_BS, alpha_E, clip)
    return total / seen.num_tokens


def _groups(
    routing: RoutingRecord, options: DirichletOptions, p_BSE: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each prior, and which tokens [B, S] are its own."""
    valid_BS = valid_tokens(routing, p_BSE.shape[1])
    priors = options.priors(p_BSE.shape[2], p_BSE.device)
    if len(priors) == 1:
        yield priors[0], valid_BS
        return
    if routing.domain_ids_T is None:
        raise ValueError("options.by_domain needs the tokens' domains, and this batch tells none")
    domain_BS = routing.domain_ids_T.view(valid_BS.shape).clamp(max=len(priors) - 1)
    for domain, alpha_E in enumerate(priors):
        yield alpha_E, valid_BS & (domain_BS == domain)


def _distance(p_BSE: Tensor, mask_BS: Tensor, alpha_E: Tensor, clip: tuple[float, float]) -> Tensor:
    """The sum over the masked tokens, ordered in each row, of the mean over experts."""
    p_BSE = torch.where(mask_BS[..., None], p_BSE, 2).sort(dim=1, stable=True).values  # others come last
    rank_S = torch.arange(1, p_BSE.shape[1] + 1, device=p_BSE.device, dtype=p_BSE.dtype)
    tokens_B1 = mask_BS.sum(1, keepdim=True)
    quantile_BS = rank_S / (tokens_B1 + 1)
    cdf_BSE = beta_cdf(p_BSE, alpha_E, alpha_E.sum() - alpha_E, clip)
    square_BS = (quantile_BS[..., None] - cdf_BSE).square().mean(-1)
    return torch.where(rank_S <= tokens_B1, square_BS, 0).sum()


def beta_cdf(
    x: Tensor, a: float | Tensor, b: float | Tensor, clip: tuple[float, float] = (0.0, math.inf)
) -> Tensor:
    """The CDF of Beta(a, b) at ``x``, of any shape; its gradient is the density, and 0 outside of (0, 1).

    ``a`` and ``b`` broadcast against ``x``. ``clip``: the least and the largest density that the gradient
    takes (0.001 and 100 in the batch-shaping of Ehteshami Bejnordi et al. 2020, arXiv:1907.06627).

    At 0 and 1 the density may be infinite; a score there (an idle expert's) cannot move anyway.
    """
    with torch.no_grad():
        kind = torch.finfo(x.dtype)
        a64, b64 = (torch.as_tensor(value, dtype=torch.float64, device=x.device) for value in (a, b))
        log_beta = torch.lgamma(a64) + torch.lgamma(b64) - torch.lgamma(a64 + b64)
        y = x.clamp(kind.tiny, 1 - kind.eps / 2).double()  # where the density is finite
        density = torch.exp((a64 - 1) * y.log() + (b64 - 1) * torch.log1p(-y) - log_beta).to(x.dtype)
        slope = torch.where((x > 0) & (x < 1), density.clamp(*clip), 0)
        accuracy = max(kind.eps / 1e3, 1e-15)
        value = _incomplete_beta(x.double().clamp(0, 1), a64, b64, log_beta, accuracy).to(x.dtype)
    return value + slope * (x - x.detach())  # the last factor is 0 and has the gradient 1


def _incomplete_beta(x: Tensor, a: Tensor, b: Tensor, log_beta: Tensor, accuracy: float) -> Tensor:
    """I_x(a, b), fp64, by Lentz's evaluation of its continued fraction (DLMF 8.17.22)."""
    turn = x > (a + 1) / (a + b + 2)  # beyond, 1 - I_{1-x}(b, a) converges faster
    y = torch.where(turn, 1 - x, x)
    a_y, b_y = torch.where(turn, b, a), torch.where(turn, a, b)
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
