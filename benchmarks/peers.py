"""Layers and models to compare with, each built the same way: same shapes, same activation, no dropped token.

A peer whose package is missing is skipped with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.moe import MoELayer


@dataclass(frozen=True)
class Shape:
    """T tokens, D model, F expert hidden, E experts, k experts per token."""

    tokens: int
    d_model: int
    d_ff: int
    experts: int
    top_k: int


SHAPES = {
    "A": Shape(4096, 512, 1024, 16, 2),
    "B": Shape(4096, 512, 256, 64, 8),
    "C": Shape(2048, 1024, 2048, 8, 2),
}
Forward = Callable[[Tensor], Tensor]


class DenseSwiGLU(nn.Module):
    """A dense layer of the same active FLOPs: width k F."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(s.d_model, s.top_k * s.d_ff, bias=False)
        self.up = nn.Linear(s.d_model, s.top_k * s.d_ff, bias=False)
        self.down = nn.Linear(s.top_k * s.d_ff, s.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class _First(nn.Module):
    """A layer that returns a tuple, reduced to its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        return out[0] if isinstance(out, tuple) else out


def ours(s: Shape) -> nn.Module:
    return _First(MoELayer(s.d_model, s.d_ff, s.experts, router_options={"top_k": s.top_k}))


def dense(s: Shape) -> nn.Module:
    return DenseSwiGLU(s)


def transformers_qwen3(s: Shape) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=s.d_model,
        moe_intermediate_size=s.d_ff,
        num_experts=s.experts,
        num_experts_per_tok=s.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = "grouped_mm"
    return _initialised(_First(Qwen3MoeSparseMoeBlock(config)))


def transformers_mixtral(s: Shape) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=s.d_model,
        intermediate_size=s.d_ff,
        num_local_experts=s.experts,
        num_experts_per_tok=s.top_k,
    )
    config._experts_implementation = "grouped_mm"
    return _initialised(_First(MixtralSparseMoeBlock(config)))


def deepspeed_moe(s: Shape) -> nn.Module:
    """DeepSpeed's MoE with drop_tokens=False, its SwiGLU expert written as users write it."""
    import deepspeed
    from deepspeed.moe.layer import MoE

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(s.d_model, s.d_ff, bias=False)
            self.up = nn.Linear(s.d_model, s.d_ff, bias=False)
            self.down = nn.Linear(s.d_ff, s.d_model, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    if not deepspeed.comm.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29511")
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, rank=0, world_size=1)
    layer = MoE(s.d_model, Expert(), num_experts=s.experts, ep_size=1, k=s.top_k, drop_tokens=False)
    layer.set_deepspeed_parallelism()
    return _First(layer)


LAYERS: dict[str, Callable[[Shape], nn.Module]] = {
    "dense SwiGLU": dense,
    "moetrain": ours,
    "transformers Mixtral": transformers_mixtral,
    "transformers Qwen3-MoE": transformers_qwen3,
    "deepspeed, no drop": deepspeed_moe,
}


def _initialised(module: nn.Module) -> nn.Module:
    """Some of transformers' expert tensors are left uninitialised outside a whole model."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module


def saved_bytes(run: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes that autograd keeps between forward and backward: distinct storages, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
        total = sum(kept.values())  # while the graph still holds them, no address is used twice
    del out
    return total
