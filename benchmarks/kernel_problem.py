"""Operands of an MoE layer's kernels, with rows of a drawn routing, and a unit of what is measured of them.

Shapes: T tokens, D model, F hidden, P = 2F, E experts, k experts a token, N = T k, R block-aligned rows,
B blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from bounded import Bounded
from peers import Shape
from torch import Tensor

from moetrain.kernels.metadata import Blocks
from moetrain.moe.dispatch.plan import layout
from moetrain.ops.experts.rows import Rows, Segments
from moetrain.ops.experts.triton_cases import block_experts_B, block_starts_E1

LOADS = ("uniform", "zipf")
_ZIPF = 1.2
ACTIVATION = "swiglu"
Run = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Problem:
    """``rows`` and ``meta`` say the same of computed rows, to the package's operators and to the kernels.

    ``useful`` is the number of rows of each expert on the host; ``sources_N`` and ``weights_N`` are of the
    assignments in the order of experts, ``slots_N`` the row of each.
    """

    shape: Shape
    dtype: torch.dtype
    rows: Rows
    meta: Blocks
    useful: list[int]
    sources_N: Tensor
    weights_N: Tensor
    slots_N: Tensor
    source_XD: Tensor
    weights_R: Tensor
    w_up_EDP: Tensor
    w_down_EFD: Tensor
    dout_RD: Tensor
    logits_TE: Tensor

    @property
    def used_R(self) -> Tensor:
        """Which rows are an assignment's."""
        return self.rows.ids_R >= 0

    def experts(self) -> Iterator[tuple[int, slice]]:
        """(expert, its rows without padding) of each expert that has any."""
        start = 0
        for expert, (useful, aligned) in enumerate(zip(self.useful, self.rows.segments.aligned, strict=True)):
            if useful:
                yield expert, slice(start, start + useful)
            start += aligned

    def gathered(self) -> Bounded:
        """The source row of each computed row, zero for padding."""
        used = self.used_R
        x = self.source_XD.index_select(0, self.rows.ids_R.clamp(min=0)).double()
        return Bounded.exact(x * used[:, None])


def chosen(shape: Shape, load: str, generator: torch.Generator) -> Tensor:
    """ids [T, k]: distinct experts of each token, of equal or of Zipf's probabilities (exponent 1.2)."""
    popularity_E = torch.ones(shape.experts)
    if load == "zipf":
        popularity_E = torch.arange(1, shape.experts + 1.0) ** -_ZIPF
    noise_TE = -torch.rand(shape.tokens, shape.experts, generator=generator).clamp(min=1e-20).log()
    return (noise_TE / popularity_E).topk(shape.top_k, largest=False).indices


def draw(
    shape: Shape, load: str, dtype: torch.dtype, device: torch.device, block: int, seed: int = 0
) -> Problem:
    """A problem with values of a trained layer's size: rows of norm sqrt(D), matrices that keep it."""
    generator = torch.Generator().manual_seed(seed)
    order_N = chosen(shape, load, generator).flatten().sort(stable=True)
    counts_E = torch.bincount(order_N.values, minlength=shape.experts)
    sources_N = (order_N.indices // shape.top_k).to(device)
    useful, counts_E = counts_E.tolist(), counts_E.to(device)
    bound, slots_N = layout(sources_N, counts_E, None, shape.tokens, block)
    rows = Rows(bound.ids_R, Segments(counts_E, block, useful), bound.by_source_N, bound.ends_X)
    size = rows.ids_R.shape[0]
    torch.manual_seed(seed)

    def normal(*of: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(of, device=device) * scale).to(dtype)

    weights_N = torch.rand(len(sources_N), device=device) + 0.1
    weights_R = weights_N.new_zeros(size).scatter(0, slots_N, weights_N)
    meta = Blocks(block, rows.ids_R, block_starts_E1(rows.segments), block_experts_B(rows.segments, size))
    dout_RD = normal(size, shape.d_model) * (rows.ids_R >= 0)[:, None]
    return Problem(
        shape, dtype, rows, meta, useful, sources_N, weights_N, slots_N,
        normal(shape.tokens, shape.d_model), weights_R,
        normal(shape.experts, shape.d_model, 2 * shape.d_ff, scale=shape.d_model**-0.5),
        normal(shape.experts, shape.d_ff, shape.d_model, scale=shape.d_ff**-0.5),
        dout_RD, torch.randn(shape.tokens, shape.experts, device=device),
    )  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """``flops`` of useful work in products. ``ours`` returns the outputs that ``reference`` bounds.

    Of an output as long as the computed rows only the rows of assignments are compared. ``others``: the same
    by torch, by name.
    """

    name: str
    flops: int
    ours: Run
    reference: Callable[[], list[Bounded]]
    others: dict[str, Run] = field(default_factory=dict)


def flops(p: Problem, columns: int) -> int:
    """Of the product of every assignment's row with a matrix [D, columns]."""
    return 2 * p.shape.tokens * p.shape.top_k * p.shape.d_model * columns


def random_rows(p: Problem, columns: int, seed: int) -> Tensor:
    """Values for rows of assignments, zero elsewhere."""
    generator = torch.Generator(p.dout_RD.device).manual_seed(seed)
    x = torch.randn(len(p.rows.ids_R), columns, generator=generator, device=p.dout_RD.device)
    return (x * p.used_R[:, None]).to(p.dtype)


def ends(p: Problem) -> Tensor:
    """Of each expert's rows with padding, as torch's grouped product wants them."""
    return p.rows.segments.aligned_E.cumsum(0, dtype=torch.int32)
