"""Experts that are one shared network, and low-rank products of their own beside its matrices (MixLoRA).

Li et al. 2024, arXiv:2404.15159. The network's first matrices multiply a token once, whatever the number of
its experts: these products travel beside the token's row, and each expert adds its own. What experts send
back are hidden rows, times their routing weights: the last matrix is linear, and multiplies a token's sum of
them once.

Shapes: B batch, S sequence, D model, F hidden units, P = 2F (gated) or F, R computed rows, E experts, L rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.moe.context import RouterContext
from moetrain.moe.dispatch.base import ExpertRows, Work
from moetrain.moe.expert_dropout import DOWN_SALT, GATE_SALT, UP_SALT, dropped, without_keys
from moetrain.moe.experts import ExpertsModule, pairs_of
from moetrain.moe.mlp import MATRICES
from moetrain.moe.options import Keep
from moetrain.moe.questions import Read
from moetrain.moe.routing import Routing
from moetrain.moe.shared_network import SharedNetworkLayer
from moetrain.ops.activations import activate, gate_and_up, is_gated
from moetrain.ops.experts.loop import with_product
from moetrain.ops.experts.operands import Pair
from moetrain.ops.gather_sum import gather_rows
from moetrain.ops.linear import linear, linears
from moetrain.ops.precision import product_dtype


class LowRankExperts(ExpertsModule):
    """The products of E experts: all that is theirs. ``models/lora.py`` adds them, under the matrices' names.

    Rows are the token's, [D], and the network's pre-activations of it, [P]. Results are the expert's hidden
    row, [F], and what its product beside the last matrix makes of it, [D], if there is one.
    """

    takes_low_rank = MATRICES

    def __init__(self, num_experts: int, d_model: int, activation: str, backend: str, keep: Keep) -> None:
        super().__init__(num_experts, activation, backend, keep)
        self.d_model = d_model

    def forward(self, work: Work, read: Read | None = None) -> list[Tensor]:
        assert read is None, "no row is an expert's output"
        pairs = zip(*(pairs_of(self.added(leaf), work.sizes) for leaf in MATRICES), strict=True)
        firsts = accumulate(work.sizes[:-1], initial=self.first_expert)
        return [
            work.done(self._kept(rows, first, beside), chunk)
            for chunk, (rows, first, beside) in enumerate(zip(work.arrivals(), firsts, pairs, strict=True))
        ]

    def needs_counts(self, x_TD: Tensor, block: int) -> bool:
        return True

    def _kept(self, rows: ExpertRows, first: int, beside: Sequence[Pair | None]) -> Tensor:
        if self.keep is Keep.preactivation:
            return self._compute(rows, first, beside)
        out_RA: Tensor = checkpoint(
            self._compute, rows, first, beside, use_reentrant=False, preserve_rng_state=False
        )
        return out_RA

    def _compute(self, rows: ExpertRows, first: int, beside: Sequence[Pair | None]) -> Tensor:
        gate, up, down = beside
        segments, ids_R = rows.rows.segments, rows.rows.ids_R
        source_XW, row_R = rows.source_XD, None
        if self.drops:
            experts_E = torch.arange(first, first + segments.num_experts, device=ids_R.device)
            source_XW, row_R = without_keys(rows, experts_E)
        backend = "loop" if self.backend == "loop" else "torch"

        def with_own(y_RN: Tensor, x_RK: Tensor, pair: Pair | None, salt: int) -> Tensor:
            if row_R is not None:
                x_RK = dropped(x_RK, row_R, salt, self.dropout.beside)
            return with_product(y_RN, x_RK, pair, segments.aligned, backend)

        rows_RW = gather_rows(source_XW.to(product_dtype(source_XW)), ids_R)
        x_RD, z_RP = rows_RW.split([self.d_model, rows_RW.shape[1] - self.d_model], 1)
        gate_RF, up_RF = gate_and_up(z_RP, self.activation)
        gate_RF = None if gate_RF is None else with_own(gate_RF, x_RD, gate, GATE_SALT)
        h_RF = activate(gate_RF, with_own(up_RF, x_RD, up, UP_SALT), self.activation)
        h_RF = (h_RF * rows.weights_R[:, None]).to(h_RF.dtype)
        if down is None:
            return h_RF
        nothing_RD = h_RF.new_zeros(len(h_RF), self.d_model)
        return torch.cat([h_RF, with_own(nothing_RD, h_RF, down, DOWN_SALT)], 1)


class LowRankLayer(SharedNetworkLayer):
    """y = sum over a token's assignments of weight * (the network with an expert's products)(x).

    ``d_ff``: of the network, which has ``layer``'s activation.
    """

    experts: LowRankExperts

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        activation: str,
        backend: str,
        keep: Keep,
        **layer: Any,
    ) -> None:
        experts = LowRankExperts(num_experts, d_model, activation, backend, keep)
        layer |= {"activation": activation, "backend": backend, "keep": keep, "experts": experts}
        super().__init__(d_model, d_ff, num_experts, **layer)
        if self.router.reads_outputs:
            raise ValueError(
                f"{type(self.router).__name__} compares experts' whole outputs, and of experts.kind=low_rank "
                "no row is one: take another router, or experts.kind=networks"
            )
        self.make_network(d_model, d_ff, activation)

    def forward(
        self,
        x_BSD: Tensor,
        ctx: RouterContext | None = None,
        router_input: Tensor | None = None,
        shared_input: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        seen_BSD = self.read_by_router(x_BSD, ctx) if router_input is None else router_input
        ups = [getattr(self, leaf) for leaf in (MATRICES[:2] if is_gated(self.activation) else MATRICES[1:2])]
        z = linears(x_BSD, ups)
        started = self.start(torch.cat([x_BSD.to(z[0].dtype), *z], -1), ctx, seen_BSD)
        width, d_ff = self.w_down_DF.shape
        own = replace(started, x_BSD=started.x_BSD[..., :width])
        beside = self.beside(own, x_BSD if shared_input is None else shared_input)
        sums_BSW, routing = self.finish(started, self.compute(started), [])
        h_BSF, added_BSD = sums_BSW.split([d_ff, sums_BSW.shape[-1] - d_ff], -1)
        y_BSD = linear(h_BSF, self.w_down_DF)
        for other_BSD in [*([added_BSD] if added_BSD.shape[-1] else []), *beside]:
            y_BSD = y_BSD + other_BSD.to(y_BSD.dtype)
        return y_BSD, routing
