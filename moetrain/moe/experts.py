"""Stacked experts: one tensor a projection, the global expert dimension first.

Shapes: E experts, D model, F hidden, P = C F, R rows, C columns a hidden unit (2 for a gated
activation: gate, up; 1 for a plain one), K and N inner and outer width of a matrix, L rank of what is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moetrain.moe.dispatch.base import ExpertRows, Work
from moetrain.moe.expert_dropout import ExpertDropout, expert_mlp_dropped
from moetrain.moe.options import FirstWeights, Keep
from moetrain.moe.questions import Read
from moetrain.ops import expert_mlp
from moetrain.ops.activations import is_gated
from moetrain.ops.experts.case import Case
from moetrain.ops.experts.operands import Pair
from moetrain.ops.experts.table import NAMES, on_device
from moetrain.ops.held import held_rows, hold
from moetrain.ops.init import Constant, Normal, parameter
from moetrain.ops.local_part import local_part
from moetrain.ops.low_rank import PREFIX, StackedLowRank
from moetrain.ops.precision import product_dtype

_RANK_UNIT = 8


class ExpertsModule(nn.Module):
    """What holds a layer's experts. Ranks share them by the first dimension of each of its parameters.

    ``first_expert``: the number of the first one here. ``dropout``: of what experts read and compute.
    """

    takes_low_rank: tuple[str, ...] = ()

    def __init__(self, num_experts: int, activation: str, backend: str, keep: Keep) -> None:
        super().__init__()
        if backend not in NAMES:
            raise ValueError(f"unknown experts backend {backend!r}; known: {', '.join(NAMES)}")
        self.dropout, self.first_expert = ExpertDropout(), 0
        self.num_experts, self.activation, self.backend, self.keep = num_experts, activation, backend, keep

    def forward(self, work: Work, read: Read | None = None) -> list[Tensor]:
        """Compute each chunk's rows times their routing weights, and pass them to ``work.done``.

        Returns the input of ``work.combine``, a tensor a chunk, in autocast's dtype if it is on. One call
        computes all chunks, so that sharded weights are gathered once. ``read``: what it makes of a row is
        sent back in its place (``questions.py``).
        """
        raise NotImplementedError

    def needs_counts(self, x_TD: Tensor, block: int) -> bool:
        """Whether what computes ``x_TD`` in blocks of rows needs each expert's number of rows on the host."""
        raise NotImplementedError

    def added(self, leaf: str) -> StackedLowRank | None:
        """The products beside the matrices ``leaf``; None: there are none."""
        return self._modules.get(PREFIX + leaf)  # type: ignore[return-value]

    @property
    def drops(self) -> bool:
        """Whether it wants rows with keys (``expert_dropout.py``)."""
        return self.training and bool(self.dropout)


class Experts(ExpertsModule):
    """E feed-forward networks of one width, computed together.

    ``w_gate_up_EDCF`` holds gate and up side by side, so that one product reads the rows once and a cut of F
    is a cut of both. ``bias``: both projections have one. The first ``frozen`` of all are not trained
    (``ops/held.py``).
    """

    forward_methods = ("mean_keys",)  # what else reads the weights, so that ranks gather them first
    takes_low_rank = ("w_gate_up_EDCF", "w_down_EFD")

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_ff: int,
        activation: str = "swiglu",
        backend: str = "auto",
        keep: Keep = Keep.preactivation,
        first_weights: FirstWeights = FirstWeights.model,
        dropout: ExpertDropout | None = None,
        bias: bool = False,
        frozen: int = 0,
    ) -> None:
        super().__init__(num_experts, activation, backend, keep)
        self.dropout = dropout or ExpertDropout()
        columns = 2 if is_gated(activation) else 1
        up, down = first_weights.stds(num_experts, d_model, d_ff)
        self.w_gate_up_EDCF = parameter((num_experts, d_model, columns, d_ff), Normal(up))
        self.w_down_EFD = parameter((num_experts, d_ff, d_model), Normal(down))
        zero = Constant(0.0)
        self.bias_gate_up_ECF = parameter((num_experts, columns, d_ff), zero) if bias else None
        self.bias_down_ED = parameter((num_experts, d_model), zero) if bias else None
        self.frozen = frozen
        if frozen:
            hold(self.w_gate_up_EDCF)
            hold(self.w_down_EFD)
        self.keeps_own_init = first_weights is not FirstWeights.model

    def forward(self, work: Work, read: Read | None = None) -> list[Tensor]:
        held = self.frozen - self.first_expert
        ups, downs = (_parts(w, work.sizes, held) for w in (self.w_gate_up_EDCF, self.w_down_EFD))
        pairs = zip(*(pairs_of(self.added(leaf), work.sizes) for leaf in self.takes_low_rank), strict=True)
        firsts = accumulate(work.sizes[:-1], initial=self.first_expert)
        biases = self._biases(work.sizes)
        return [
            work.done(_read(self._compute(rows, up, down, first, of_chunk, beside), rows, first, read), chunk)
            for chunk, (rows, up, down, first, of_chunk, beside) in enumerate(
                zip(work.arrivals(), ups, downs, firsts, biases, pairs, strict=True)
            )
        ]

    def mean_keys(self) -> Tensor:
        """The mean over its hidden units of each expert's keys, [E, D] of those here, in fp32 at least.

        A unit's key is its column of the first matrix, of a gated activation the gate's.
        """
        held = self.frozen - self.first_expert
        keys_EDF = held_rows(local_part(self.w_gate_up_EDCF), held)[:, :, 0]
        wide = torch.promote_types(keys_EDF.dtype, torch.float32)
        means_ED = keys_EDF.mean(-1, dtype=wide)
        added = self.added("w_gate_up_EDCF")
        if added is None:
            return means_ED
        a_EDL, b_ELF = local_part(added.a_EKR).to(wide), local_part(added.b_ERN)[:, :, 0]
        beside_ED: Tensor = (a_EDL @ b_ELF.mean(-1, keepdim=True, dtype=wide)).squeeze(-1) * added.factor
        return means_ED + beside_ED

    def needs_counts(self, x_TD: Tensor, block: int) -> bool:
        if self.drops:
            return True
        keep = self.keep is Keep.preactivation
        bias = self.bias_down_ED is not None
        added = any(self.added(leaf) is not None for leaf in self.takes_low_rank)
        case = Case.of(self.w_down_EFD, product_dtype(x_TD), self.activation, block, keep, bias, added)
        return not on_device(self.backend, case)

    def _biases(self, sizes: list[int]) -> Sequence[tuple[Tensor, Tensor] | None]:
        """Those of each chunk, [E, P] and [E, D]."""
        if self.bias_gate_up_ECF is None or self.bias_down_ED is None:
            return [None] * len(sizes)
        ups, downs = (_parts(b, sizes) for b in (self.bias_gate_up_ECF, self.bias_down_ED))
        return [(up_ECF.flatten(1), down_ED) for up_ECF, down_ED in zip(ups, downs, strict=True)]

    def _compute(
        self,
        rows: ExpertRows,
        w_gate_up_EDCF: Tensor,
        w_down_EFD: Tensor,
        first: int,
        biases: tuple[Tensor, Tensor] | None,
        beside: tuple[Pair | None, Pair | None],
    ) -> Tensor:
        if self.drops:
            return self._compute_dropped(rows, w_gate_up_EDCF.flatten(2), w_down_EFD, first, biases, beside)
        x_XD = rows.source_XD
        return expert_mlp(
            x_XD,
            rows.rows,
            rows.weights_R,
            w_gate_up_EDCF.flatten(2),
            w_down_EFD,
            self.activation,
            self.backend,
            product_dtype(x_XD),
            self.keep is Keep.preactivation,
            biases,
            *beside,
        )

    def _compute_dropped(
        self,
        rows: ExpertRows,
        w_up_EDP: Tensor,
        w_down_EFD: Tensor,
        first: int,
        biases: tuple[Tensor, Tensor] | None,
        beside: tuple[Pair | None, Pair | None],
    ) -> Tensor:
        experts_E = torch.arange(first, first + len(w_down_EFD), device=rows.source_XD.device)
        activation, dropout, dtype = self.activation, self.dropout, product_dtype(rows.source_XD)
        backend = "loop" if self.backend == "loop" else "torch"

        def compute() -> Tensor:
            matrices = (w_up_EDP, w_down_EFD)
            return expert_mlp_dropped(
                rows, experts_E, *matrices, activation, dropout, dtype, backend, biases, *beside
            )

        if self.keep is Keep.preactivation:
            return compute()
        out_RD: Tensor = checkpoint(compute, use_reentrant=False, preserve_rng_state=False)
        return out_RD


def _read(out_RD: Tensor, rows: ExpertRows, first: int, read: Read | None) -> Tensor:
    """What ``read`` makes of the rows of experts from number ``first`` on; None: the rows."""
    if read is None:
        return out_RD
    segments = rows.rows.segments
    place_R = torch.arange(out_RD.shape[0], device=out_RD.device)
    expert_R = torch.bucketize(place_R, segments.aligned_E.cumsum(0), right=True)
    return read(out_RD, first + expert_R.clamp(max=segments.num_experts - 1))


def pairs_of(added: StackedLowRank | None, sizes: list[int]) -> list[Pair | None]:
    """The factors of each chunk's products."""
    if added is None:
        return [None] * len(sizes)
    a_EKL, b_ELN = local_part(added.a_EKR), local_part(added.b_ERN).flatten(2) * added.factor
    if a_EKL.device.type != "cpu":  # where grouped products want rows of whole 16 bytes
        spare = -a_EKL.shape[2] % _RANK_UNIT
        a_EKL, b_ELN = F.pad(a_EKL, (0, spare)), F.pad(b_ELN, (0, 0, 0, spare))
    return [Pair(a, b) for a, b in zip(_parts(a_EKL, sizes), _parts(b_ELN, sizes), strict=True)]


def _parts(weight: Tensor, sizes: list[int], held: int = 0) -> tuple[Tensor, ...]:
    """By ``split``, whose gradient is put together once; slices would each make one of the whole size."""
    local = held_rows(local_part(weight), held)
    return (local,) if len(sizes) == 1 else local.split(sizes)
