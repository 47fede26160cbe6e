"""Runs of tokens that share one merged network, and the states that they are routed by.

A row is cut into segments of ``length`` tokens, whatever documents it holds. A segment is routed by the mean
of the one before it (Zhong et al. 2024, Lory, arXiv:2405.03133), so that no token sees a later one; the
first, which has none, by a state of zeros (Lory routes it by its own tokens, with their gradient stopped). Or
the row is one segment, routed by its own mean, which looks ahead.

Shapes: B batch, S sequence, T = B S tokens, D width, G segments of a row, L tokens of a segment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.moe.context import RouterContext


@dataclass(frozen=True)
class Segments:
    """``length`` None: a row is one segment, routed by itself. ``seen``: tokens of the row before these."""

    batch: int
    seq: int
    length: int | None
    seen: int = 0

    @property
    def offset(self) -> int:
        """Tokens that the first segment has already."""
        return 0 if self.length is None else self.seen % self.length

    @property
    def groups(self) -> int:
        return 1 if self.length is None else max(1, -(-(self.offset + self.seq) // self.length))

    def cut(self, x_BSD: Tensor) -> Tensor:
        """[B G, L, D], zeros where a row does not fill its segments; a row of one segment as it is."""
        if self.length is None or self.groups == 1:
            return x_BSD
        after = self.groups * self.length - self.offset - self.seq
        padded: Tensor = F.pad(x_BSD, (0, 0, self.offset, after))
        x_XLD: Tensor = padded.unflatten(1, (self.groups, self.length)).flatten(0, 1)
        return x_XLD

    def joined(self, y_XLD: Tensor) -> Tensor:
        """The inverse of :meth:`cut`, [B, S, D]."""
        if self.length is None or self.groups == 1:
            return y_XLD
        whole: Tensor = y_XLD.unflatten(0, (self.batch, self.groups)).flatten(1, 2)
        return whole[:, self.offset : self.offset + self.seq]

    def first_tokens(self, x_Tn: Tensor) -> Tensor:
        """[B G, n]: the rows of ``x_Tn`` of each segment's first token here."""
        at_G = torch.arange(self.groups, device=x_Tn.device) * (self.length or 0) - self.offset
        x_BSn: Tensor = x_Tn.unflatten(0, (self.batch, self.seq))
        return x_BSn[:, at_G.clamp(min=0)].flatten(0, 1)

    def spread(self, x_Xn: Tensor) -> Tensor:
        """[T, n]: to each token what its segment has."""
        at_S = torch.arange(self.seq, device=x_Xn.device) + self.offset
        at_S = at_S // (self.length or self.offset + self.seq + 1)
        x_BGn: Tensor = x_Xn.unflatten(0, (self.batch, self.groups))
        return x_BGn[:, at_S].flatten(0, 1)


def routing_states(x_BSD: Tensor, segments: Segments, ctx: RouterContext, key: str) -> Tensor:
    """[B G, D], fp32 at least: what each segment is routed by. Padding counts for nothing.

    Under generation ``ctx.memory`` keeps, by ``key``, the last whole segment's mean and the sums of the one
    that is not whole yet.
    """
    batch, seq, width = x_BSD.shape
    wide = torch.promote_types(x_BSD.dtype, torch.float32)
    valid_BS1 = x_BSD.new_ones(batch, seq, 1, dtype=wide)
    if ctx.valid_T is not None:
        valid_BS1 = ctx.valid_T.view(batch, seq, 1).to(wide)
    shape = (batch, segments.groups)
    sums_BGD: Tensor = segments.cut(x_BSD.to(wide) * valid_BS1).sum(1).unflatten(0, shape)
    counts_BG1: Tensor = segments.cut(valid_BS1).sum(1).unflatten(0, shape)
    if segments.length is None:
        return (sums_BGD / counts_BG1.clamp(min=1)).flatten(0, 1)
    before_BD = sums_BGD.new_zeros(batch, width)
    if ctx.memory is not None and key in ctx.memory:
        before_BD, sum_BD, count_B1 = ctx.memory[key].split([width, width, 1], -1)
        sums_BGD = torch.cat([sums_BGD[:, :1] + sum_BD[:, None], sums_BGD[:, 1:]], 1)
        counts_BG1 = torch.cat([counts_BG1[:, :1] + count_B1[:, None], counts_BG1[:, 1:]], 1)
    means_BGD = sums_BGD / counts_BG1.clamp(min=1)
    states_BGD = torch.cat([before_BD[:, None], means_BGD[:, :-1]], 1)
    if ctx.memory is not None:
        whole = (segments.offset + seq) % segments.length == 0
        kept = (means_BGD, 0 * sums_BGD, 0 * counts_BG1) if whole else (states_BGD, sums_BGD, counts_BG1)
        ctx.memory[key] = torch.cat([part[:, -1] for part in kept], -1)
    return states_BGD.flatten(0, 1)
