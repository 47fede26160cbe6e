"""The experts' feed-forward one block of rows at a time: what kernels/grouped computes.

Shapes: X source rows, D model, E experts, F hidden, P = 2F or F, B blocks, R = B * block rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import activate


def gather(source_XD: Tensor, ids_R: Tensor) -> Tensor:
    """``source[ids]``, zero where an id is -1."""
    rows = [source_XD[i] if i >= 0 else source_XD.new_zeros(source_XD.shape[1]) for i in ids_R.tolist()]
    return torch.stack(rows)


def forward(
    x_RD: Tensor,
    block_expert_B: Tensor,
    weights_R: Tensor,
    w_up_EDP: Tensor,
    w_down_EFD: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """(out [R, D], z [R, P]) of gathered rows, differentiable; zero in blocks of no expert."""
    out, z = [], []
    blocks = block_expert_B.tolist()
    for expert, x, weights in zip(blocks, x_RD.chunk(len(blocks)), weights_R.chunk(len(blocks)), strict=True):
        each = x @ w_up_EDP[expert] if expert >= 0 else x.new_zeros(len(x), w_up_EDP.shape[2])
        z.append(each)
        out.append((activate(each, activation) * weights[:, None]) @ w_down_EFD[expert])
    return torch.cat(out), torch.cat(z)
