"""Blocks in plain torch, by loops over tokens and experts, from a decoder's own weights: an oracle.

Attention and norms are written out too. Shapes: B batch, S sequence, T = B S tokens, D model, H head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetrain.models import Decoder


def norm(module: Any, x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + module.eps).rsqrt() * module.weight_D


def attention(
    layer: Any, x_BSD: Tensor, theta: float, window: int | None = None, factor: float = 1.0
) -> Tensor:
    """Causal grouped-query attention with RoPE on halves, head by head; angles divided by ``factor``."""
    batch, seq, _ = x_BSD.shape
    width, groups = layer.head_dim, layer.num_heads // layer.num_kv_heads
    q, k, v = (
        (x_BSD @ weight.T).view(batch, seq, -1, width)
        for weight in (layer.w_q_QD, layer.w_k_GD, layer.w_v_GD)
    )
    angles = torch.arange(seq)[:, None] * theta ** (-torch.arange(0, width, 2).to(x_BSD.dtype) / width)
    angles = angles / factor
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def turned(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    q, k = turned(q), turned(k)
    heads = []
    for h in range(layer.num_heads):
        scores = q[:, :, h] @ k[:, :, h // groups].transpose(1, 2) / width**0.5
        mask = torch.ones(seq, seq, dtype=torch.bool).tril()
        mask = mask if window is None else mask.triu(1 - window)
        heads.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[:, :, h // groups])
    return torch.cat(heads, -1) @ layer.w_out_DQ.T


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def mlp(module: Any, x: Tensor) -> Tensor:
    """SwiGLU."""
    return (silu(x @ module.w_gate_FD.T) * (x @ module.w_up_FD.T)) @ module.w_down_DF.T


def experts(layer: Any, x_BSD: Tensor, seen_BSD: Tensor | None = None) -> Tensor:
    """The routed experts alone: softmax, the best k, weights of sum 1; token by token."""
    x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
    seen_TD = x_TD if seen_BSD is None else seen_BSD.reshape(x_TD.shape)
    rows = []
    for x_D, seen_D in zip(x_TD, seen_TD, strict=True):
        p_E = (layer.router.weight_ED @ seen_D).softmax(0)
        chosen = sorted(range(len(p_E)), key=lambda e: -float(p_E[e].detach()))[: layer.router.top_k]
        total = sum(p_E[e] for e in chosen)
        rows.append(sum(p_E[e] / total * network(layer.experts, e, x_D) for e in chosen))
    return torch.stack(rows).view(x_BSD.shape)


def network(module: Any, expert: int, x_D: Tensor) -> Tensor:
    up_DCF, down_FD = module.w_gate_up_EDCF[expert], module.w_down_EFD[expert]
    return (silu(x_D @ up_DCF[:, 0]) * (x_D @ up_DCF[:, 1])) @ down_FD


def moe(layer: Any, x_BSD: Tensor, seen_BSD: Tensor | None = None) -> Tensor:
    y_BSD = experts(layer, x_BSD, seen_BSD)
    return y_BSD if layer.shared is None else y_BSD + mlp(layer.shared, x_BSD)


def feed(layer: Any, x_BSD: Tensor) -> Tensor:
    """A dense layer, or an MoE layer of its own input."""
    return moe(layer, x_BSD) if hasattr(layer, "router") else mlp(layer, x_BSD)


def attended(model: Decoder, block: Any, x_BSD: Tensor) -> Tensor:
    """The stream after a block's attention."""
    return x_BSD + attention(block.attention, norm(block.attention_norm, x_BSD), model.cfg.rope_theta)


def gradients(model: Decoder, hidden_BSD: Tensor) -> list[Tensor]:
    """Of a loss that weighs every element differently, for every parameter."""
    weights = torch.linspace(-1, 1, hidden_BSD.numel(), dtype=hidden_BSD.dtype).view(hidden_BSD.shape)
    loss = (hidden_BSD * weights).sum()
    return list(
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    )


def assert_same(model: Decoder, ids_BS: Tensor, expected_BSD: Tensor, tolerance: float = 1e-10) -> None:
    """The model's hidden states and all gradients are those of ``expected_BSD``, which has a graph."""
    hidden_BSD = model(ids_BS).hidden_BSD
    torch.testing.assert_close(hidden_BSD, expected_BSD, rtol=tolerance, atol=tolerance)
    found, wanted = gradients(model, hidden_BSD), gradients(model, expected_BSD)
    for (name, _), ours, theirs in zip(model.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
        assert ours.any(), name
