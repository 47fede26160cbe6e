"""Decoders with low-rank products, and the same functions written as sums of matrices.

Shapes: E experts, N rows and K columns of a matrix, R rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from model_cases import TINY, VOCAB
from torch import Tensor

from moetrain.models import Decoder
from moetrain.models.lora_options import LoraConfig
from moetrain.moe.options import Backend, ExpertKind, ExpertsConfig, RouterConfig
from moetrain.moe.routers.topk import TopKOptions
from moetrain.ops.low_rank import is_factor

ALL = LoraConfig(
    rank=3,
    alpha=5.0,
    targets=("*.attention.w_q_QD=4", "*.attention.w_*", "*.feed_forward.w_*", "*.shared.w_*", "*.experts.*=2",
             "*.router.weight_ED=1"),
)  # fmt: skip


def model(
    lora: LoraConfig = ALL,
    backend: Backend = Backend.auto,
    kind: ExpertKind = ExpertKind.networks,
    dtype: torch.dtype = torch.float64,
    experts: dict[str, Any] | None = None,
    router: RouterConfig | None = None,
    **changes: Any,
) -> Decoder:
    """Seeded; the second of three layers is MoE, with a shared expert where it may be."""
    torch.manual_seed(0)
    shared = int(kind is ExpertKind.networks)
    cfg = replace(TINY, **{"moe_every": 2, "num_shared_experts": shared, "lora": lora, **changes})
    options = ExpertsConfig(backend=backend, kind=kind, **(experts or {}))
    return Decoder(cfg, router or TopKOptions(top_k=2), options, VOCAB).to(dtype)


def drawn(decoder: Decoder, std: float = 1 / 3) -> Decoder:
    """With products and experts' biases that are not zero: factors of that standard deviation."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if is_factor(name) or ".experts.bias_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
    return decoder


def factors(decoder: Decoder) -> dict[str, tuple[str, str]]:
    """The name of each matrix with a product -> the names of a and b."""
    names = [name for name, _ in decoder.named_parameters() if is_factor(name)]
    pairs: dict[str, tuple[str, str]] = {}
    for a in (name for name in names if name.rpartition(".")[2].startswith("a_")):
        module = a.rpartition(".")[0]
        (b,) = [name for name in names if name.startswith(f"{module}.b_")]
        pairs[module.replace(".lora_", ".")] = (a, b)
    return pairs


def rank_of(a: Tensor) -> int:
    return a.shape[2] if a.ndim == 3 else a.shape[0]


def product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """What is added to the matrix, by numpy."""
    if a.ndim == 2:
        return torch.from_numpy(factor * np.einsum("nr,rk->nk", b.numpy(force=True), a.numpy(force=True)))
    return torch.from_numpy(factor * np.einsum("ekr,er...->ek...", a.numpy(force=True), b.numpy(force=True)))


def summed(decoder: Decoder, lora: LoraConfig = ALL) -> dict[str, Tensor]:
    """The same function's tensors without products."""
    state = dict(decoder.state_dict())
    for matrix, (a, b) in factors(decoder).items():
        state[matrix] = state[matrix] + product(state[a], state[b], lora.alpha / rank_of(state[a]))
    return {name: value for name, value in state.items() if not is_factor(name)}


def explicit(decoder: Decoder, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same function with networks as experts, each W + factor b a.

    Differentiable in ``named``, the parameters of a ``decoder`` whose experts are products
    (``experts.kind=low_rank``).
    """
    lora, result = decoder.cfg.lora, {name: w for name, w in named.items() if not is_factor(name)}
    for matrix, (a, b) in factors(decoder).items():
        factor, a_, b_ = lora.alpha / rank_of(named[a]), named[a], named[b]
        if ".experts." not in matrix:
            result[matrix] = result[matrix] + factor * torch.einsum("nr,rk->nk", b_, a_)
            continue
        shared = matrix.replace(".experts.", ".")
        result[matrix] = result[shared].t() + factor * torch.einsum("ekr,ern->ekn", a_, b_)
    for layer in {name.rpartition(".experts.")[0] for name in result if ".experts." in name}:
        own = [result.pop(f"{layer}.{leaf}", None) for leaf in ("w_gate_FD", "w_up_FD", "w_down_DF")]
        sums = [result.pop(f"{layer}.experts.{leaf}", None) for leaf in ("w_gate_FD", "w_up_FD", "w_down_DF")]
        count = next(len(w) for w in sums if w is not None)
        *ups, down = [
            w.t().expand(count, -1, -1) if s is None else s
            for w, s in zip(own, sums, strict=True) if w is not None
        ]  # fmt: skip
        result[f"{layer}.experts.w_gate_up_EDCF"] = torch.stack(ups, 2)
        result[f"{layer}.experts.w_down_EFD"] = down
    return result
