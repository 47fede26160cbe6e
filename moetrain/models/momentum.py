"""A momentum over depth: MoE layers as steps of an optimizer on the stream.

The output s of an MoE layer stands for a negative gradient. Its state goes from MoE layer to MoE layer and
begins at zero; dense layers and attention leave it as it is.

``heavy_ball``: p = mu p + s; x = x + step p.
``adam``, in the first ``adam_layers`` MoE layers: m = beta1 m + (1 - beta1) s, v = beta2 v + (1 - beta2) s^2,
x = x + adam_step m / sqrt(v + 1e-8) - decay x; p goes on meanwhile, and the layers after it are heavy balls.
``robust``: the layer reads y = x + alpha step p, then p = mu p + s and x = x + step p. Of the rate r, the
condition number k and the curvature L: step = k (1 - r)^2 (1 + r) / L, mu = k r^3 / (k - 1),
alpha = r^3 / ((k - 1) (1 - r)^2 (1 + r)).

Sources: Teo and Nguyen 2024, MomentumSMoE, arXiv:2410.14574, and its released code (heavy_ball, adam; there p
is subtracted, whose sign the experts' last matrix takes up, and its block adds the layer's output to the
stream once more; ``decay=1`` is its Adam layer, which leaves nothing of the stream). Cyrus, Hu, Van Scoy and
Lessard 2018, arXiv:1710.04753 (robust), whose momentum x_t - x_(t-1) is step p here; the released code has no
such layer.

Shapes: any, equal among stream, outputs and state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.models.wiring_options import MomentumConfig, MomentumKind

_EPS = 1e-8  # inside the root, as in the released code


class State(NamedTuple):
    """p; and of Adam m and v, which are None once the last of its layers has run."""

    p: Tensor
    m: Tensor | None = None
    v: Tensor | None = None


class Coefficients(NamedTuple):
    step: float
    mu: float
    ahead: float  # alpha


def coefficients(cfg: MomentumConfig) -> Coefficients:
    """Of the heavy ball, and of the robust method."""
    if cfg.kind is not MomentumKind.robust:
        return Coefficients(cfg.step, cfg.mu, 0.0)
    r, k = cfg.rate, cfg.condition
    shape = (1 - r) ** 2 * (1 + r)
    return Coefficients(k * shape / cfg.curvature, k * r**3 / (k - 1), r**3 / ((k - 1) * shape))


def read_at(cfg: MomentumConfig, x: Tensor, state: State | None) -> Tensor:
    """Where a layer reads the stream."""
    if cfg.kind is not MomentumKind.robust or state is None:
        return x
    step, _, ahead = coefficients(cfg)
    return x + ahead * step * state.p


def advance(
    cfg: MomentumConfig, x: Tensor, s: Tensor, state: State | None, place: int
) -> tuple[Tensor, State]:
    """The stream and the state after MoE layer ``place`` (from 0), whose output is ``s``."""
    s = s.to(x.dtype)
    step, mu, _ = coefficients(cfg)
    p = s if state is None else mu * state.p + s
    if cfg.kind is not MomentumKind.adam or place >= cfg.adam_layers:
        return x + step * p, State(p)
    m, v = (1 - cfg.beta1) * s, (1 - cfg.beta2) * s.square()
    if state is not None:
        assert state.m is not None
        assert state.v is not None
        m, v = cfg.beta1 * state.m + m, cfg.beta2 * state.v + v
    moved = x + cfg.adam_step * m * torch.rsqrt(v + _EPS)
    if cfg.decay:
        moved = moved - cfg.decay * x
    return moved, State(p, m, v) if place + 1 < cfg.adam_layers else State(p)
