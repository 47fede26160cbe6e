"""Layers to compare with, each built the same way: same shapes, same activation, no dropped token.

A peer whose package is missing is skipped with the reason. Those that need a GPU are in ``gpu_peers.py``.

Shapes: T tokens, D model, F hidden, P = 2F, E experts, K experts a token, N = T K.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.moe import MoELayer
from moetrain.parallel.precision import round_for_inference


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
TINY = {"tiny": Shape(64, 32, 16, 4, 2)}  # to see that a script runs
PUBLISHED = {**SHAPES, "Qwen3-30B-A3B": Shape(32768, 2048, 768, 128, 8)}
OURS, DENSE = "moetrain", "dense SwiGLU"
# bf16 is autocast over fp32 weights; in pure_bf16 weights (but our router's) and inputs are bf16 themselves
PRECISIONS = ("fp32", "bf16", "pure_bf16")
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


class First(nn.Module):
    """A layer that returns a tuple, reduced to its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        return out[0] if isinstance(out, tuple) else out


def as_output(layer: nn.Module) -> First:
    """``layer``, of which the first thing that it returns is the output."""
    return First(layer)


def ours(s: Shape) -> nn.Module:
    return as_output(MoELayer(s.d_model, s.d_ff, s.experts, router_options={"top_k": s.top_k}))


def moe_layer(layer: nn.Module) -> MoELayer:
    """The layer in what :func:`ours` returned."""
    assert isinstance(layer, First)
    assert isinstance(layer.layer, MoELayer)
    return layer.layer


def dense(s: Shape) -> nn.Module:
    return DenseSwiGLU(s)


class Routed(nn.Module):
    """A softmax router whose chosen weights sum to 1, and experts that ``compute`` applies.

    ``compute(x_TD, ids_TK, weights_TK, w_gate_up_EPD, w_down_EDF)`` is [T, D]: the layout of torch's linear.
    """

    def __init__(self, s: Shape, compute: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.top_k, self.compute = s.top_k, compute
        self.router_ED = nn.Parameter(torch.empty(s.experts, s.d_model))
        self.w_gate_up_EPD = nn.Parameter(torch.empty(s.experts, 2 * s.d_ff, s.d_model))
        self.w_down_EDF = nn.Parameter(torch.empty(s.experts, s.d_model, s.d_ff))
        initialised(self)

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        scores_TE = F.linear(x_TD, self.router_ED).float().softmax(-1)
        weights_TK, ids_TK = scores_TE.topk(self.top_k, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return self.compute(x_TD, ids_TK, weights_TK, self.w_gate_up_EPD, self.w_down_EDF).view_as(x)


def looped(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w_gate_up_EPD: Tensor, w_down_EDF: Tensor
) -> Tensor:
    """Expert by expert in Python, as the formula says."""
    y_TD = x_TD.new_zeros(x_TD.shape)
    for expert in range(len(w_down_EDF)):
        tokens_n, choices_n = torch.where(ids_TK == expert)
        gate_nF, up_nF = F.linear(x_TD[tokens_n], w_gate_up_EPD[expert]).chunk(2, dim=-1)
        out_nD = F.linear(F.silu(gate_nF) * up_nF, w_down_EDF[expert])
        y_TD = y_TD.index_add(0, tokens_n, (out_nD * weights_TK[tokens_n, choices_n, None]).to(y_TD.dtype))
    return y_TD


def grouped(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w_gate_up_EPD: Tensor, w_down_EDF: Tensor
) -> Tensor:
    """Rows sorted by expert, and torch's grouped product."""
    ids_N, order_N = ids_TK.flatten().sort(stable=True)
    ends_E = torch.bincount(ids_N, minlength=len(w_down_EDF)).cumsum(0, dtype=torch.int32)
    tokens_N = order_N // ids_TK.shape[1]
    gate_NF, up_NF = F.grouped_mm(x_TD[tokens_N], w_gate_up_EPD.mT, offs=ends_E).chunk(2, dim=-1)
    out_ND = F.grouped_mm(F.silu(gate_NF) * up_NF, w_down_EDF.mT, offs=ends_E)
    out_ND = out_ND * weights_TK.flatten()[order_N, None].to(out_ND.dtype)
    return out_ND.new_zeros(x_TD.shape).index_add(0, tokens_N, out_ND)


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
    return initialised(as_output(Qwen3MoeSparseMoeBlock(config)))


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
    return initialised(as_output(MixtralSparseMoeBlock(config)))


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
        # of inference, compiled where it can be: which waits without end for the lock of a killed build
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, rank=0, world_size=1)
    layer = MoE(s.d_model, Expert(), num_experts=s.experts, ep_size=1, k=s.top_k, drop_tokens=False)
    layer.set_deepspeed_parallelism()
    return as_output(layer)


LAYERS: dict[str, Callable[[Shape], nn.Module]] = {
    DENSE: dense,
    OURS: ours,
    "Python loop": lambda s: Routed(s, looped),
    "torch grouped_mm": lambda s: Routed(s, grouped),
    "transformers Mixtral": transformers_mixtral,
    "transformers Qwen3-MoE": transformers_qwen3,
    "deepspeed, no drop": deepspeed_moe,
}


def build(shape: Shape, device: str, precision: str) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that this machine can build and run forward and backward, and why not the others.

    What fails in our own layer is an error.
    """
    builders = LAYERS
    if device != "cpu" and precision == "pure_bf16":
        from gpu_peers import GPU_LAYERS

        builders = builders | GPU_LAYERS
    layers, skipped = {}, {}
    for name, builder in builders.items():
        torch.manual_seed(0)
        try:
            layer = cast(builder(shape).to(device), precision)
            x = torch.randn(2, shape.tokens // 2, shape.d_model, device=device)
            call(layer, x.requires_grad_(), precision).sum().backward()
            layer.zero_grad(set_to_none=True)
            layers[name] = layer
        except Exception as error:  # another's kernels may fail in any way on a machine that they do not know
            if name == OURS:
                raise
            lines = str(error).strip().splitlines() or [""]
            skipped[name] = (
                lines[0] if isinstance(error, ImportError) else f"{type(error).__name__}: {lines[0]}"
            )
    return layers, skipped


def cast(layer: nn.Module, precision: str) -> nn.Module:
    """``layer`` with the parameters of ``precision``."""
    if precision == "pure_bf16":
        round_for_inference(layer, torch.bfloat16)
    return layer


def call(layer: nn.Module, x: Tensor, precision: str) -> Tensor:
    """The layer's output of ``x``, in ``precision``."""
    if precision == "pure_bf16":
        return layer(x.to(torch.bfloat16))
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return layer(x)


def initialised(module: nn.Module) -> nn.Module:
    """Some of transformers' expert tensors are left uninitialised outside a whole model."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module
