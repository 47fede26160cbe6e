"""The gates by which experts' weights are averaged, one decision a segment.

smear  softmax(LN(state) . LN(w_e) + b_e) over all experts; both layer norms have a learnt gain and shift
       (Muqeeth et al. 2023, arXiv:2306.03745).
meo    softmax over the k best of noisy logits (He et al. 2023, arXiv:2310.09832, after Shazeer et al. 2017).

Shapes: X = B G segments, T tokens, D width of the state, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import Router
from moetrain.moe.routing import RoutingRecord, register_record
from moetrain.moe.topk_ops import top_ids
from moetrain.ops.init import Constant, Normal, parameter
from moetrain.ops.linear import wide_linear

_NORM_EPS, _DROPPED = 1e-5, 1e-10


@dataclass(frozen=True, kw_only=True)
class MergeRecord(RoutingRecord):
    """``scores_TE`` are the gates of each token's segment; those of several merged matrices stand side by
    side, E columns each."""

    def weights_BE(self, num_tokens: int) -> Tensor:
        assert self.scores_TE is not None
        gates_TE = self.scores_TE if self.valid_T is None else self.scores_TE * self.valid_T[:, None]
        batch = len(self.num_tokens_B)
        sums_BE: Tensor = gates_TE.unflatten(0, (batch, num_tokens // max(batch, 1))).sum(1)
        return sums_BE


register_record(MergeRecord)


class SmearGate(Router):
    """``forward(state [X, D], uniform noise [X, E] or None) -> gates [X, E]``.

    With noise, an expert of a segment is left out where its number is below ``dropout``; the rest are
    renormalised, and all are even where none is left.
    """

    has_logits = False

    def __init__(self, d_model: int, num_experts: int, dropout: float) -> None:
        super().__init__(d_model, num_experts, RouterConfig(name="smear"))
        self.dropout = dropout
        self.weight_ED = parameter((num_experts, d_model), Normal(0.01))
        self.bias_gate_E = parameter((num_experts,), Constant(0.0))
        self.state_gain_D = parameter((d_model,), Constant(1.0))
        self.state_shift_D = parameter((d_model,), Constant(0.0))
        self.weight_gain_D = parameter((d_model,), Constant(0.01))
        self.weight_shift_D = parameter((d_model,), Constant(0.0))

    def forward(self, state_XD: Tensor, noise_XE: Tensor | None) -> Tensor:  # type: ignore[override]
        with torch.autocast(state_XD.device.type, enabled=False):
            state_XD = self._normed(state_XD, self.state_gain_D, self.state_shift_D)
            weight_ED = self._normed(
                self.weight_ED.to(state_XD.dtype), self.weight_gain_D, self.weight_shift_D
            )
            gates_XE = F.linear(state_XD, weight_ED, self.bias_gate_E.to(state_XD.dtype)).softmax(-1)
            if noise_XE is not None:
                gates_XE = gates_XE * (noise_XE >= self.dropout) + _DROPPED
                gates_XE = gates_XE / gates_XE.sum(-1, keepdim=True)
            return gates_XE

    @staticmethod
    def _normed(x: Tensor, gain_D: Tensor, shift_D: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], gain_D.to(x.dtype), shift_D.to(x.dtype), _NORM_EPS)


class NoisyGate(Router):
    """``forward(state [X, D], uniform noise [X, E] or None) -> (gates [X, E], load [X, E] or None)``.

    Noise has the standard deviation softplus(w_noise . state) + 0.01, and makes the load, each expert's
    probability to be among the ``k`` best had its own noise been drawn again. Weights start from zero: at
    first noise alone decides, and without it the first of equals are taken.
    ``columns`` is the number of experts that the layer's record has.
    """

    has_logits = False

    def __init__(self, d_model: int, num_experts: int, k: int, columns: int) -> None:
        super().__init__(d_model, columns, RouterConfig(name="meo"))
        if k > num_experts:
            raise ValueError(f"model.merging.top_k={k} exceeds model.num_experts={num_experts}")
        self.k = k
        self.weight_ED = parameter((num_experts, d_model), Constant(0.0))
        self.noise_ED = parameter((num_experts, d_model), Constant(0.0))

    def forward(  # type: ignore[override]
        self, state_XD: Tensor, noise_XE: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(state_XD.device.type, enabled=False):
            clean_XE = wide_linear(state_XD, self.weight_ED)
            spread_XE = F.softplus(wide_linear(state_XD, self.noise_ED)) + 0.01
            logits_XE = clean_XE
            if noise_XE is not None:
                logits_XE = clean_XE + torch.special.ndtri(noise_XE.to(clean_XE.dtype)) * spread_XE
            ids_Xk = top_ids(logits_XE.detach(), self.k)
            best_Xk = logits_XE.gather(1, ids_Xk).softmax(-1)
            gates_XE = torch.zeros_like(logits_XE).scatter(1, ids_Xk, best_Xk)
            if noise_XE is None or self.k == logits_XE.shape[1]:
                return gates_XE + 0 * spread_XE, None  # every weight takes part, on every rank
            return gates_XE, self._load(clean_XE, logits_XE, spread_XE, ids_Xk)

    def _load(self, clean_XE: Tensor, noisy_XE: Tensor, spread_XE: Tensor, ids_Xk: Tensor) -> Tensor:
        order_Xm = noisy_XE.sort(dim=-1, descending=True, stable=True).values
        last_X1, next_X1 = order_Xm[:, self.k - 1 : self.k], order_Xm[:, self.k : self.k + 1]
        chosen_XE = torch.zeros_like(noisy_XE, dtype=torch.bool).scatter(1, ids_Xk, True)
        least_XE = torch.where(chosen_XE, next_X1, last_X1)
        load_XE: Tensor = torch.special.ndtr((clean_XE - least_XE) / spread_XE)
        return load_XE
