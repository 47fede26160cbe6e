"""Qwen3-Next's models and Qwen3.5's, small: transformers' keys and ours; theirs in fp64; and random ones."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hf_weights import KEY_HEADS
from hypothesis import strategies as st

from moetrain.models.attention_options import GatedDeltaConfig
from moetrain.models.options import QKNorm
from moetrain.moe.routers.topk import Score, TopKOptions

LINEAR, FULL = "linear_attention", "full_attention"
_THEIRS = {
    "moe_intermediate_size": 23,
    "shared_expert_intermediate_size": 19,
    "num_experts": 11,
    "num_experts_per_tok": 3,
    "rms_norm_eps": 1e-2,  # a head's output is divided by its size, which may be small
    "head_dim": 16,
    "linear_num_key_heads": KEY_HEADS,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 13,
    "linear_value_head_dim": 7,
    "linear_conv_kernel_dim": 3,
    "layer_types": [LINEAR, LINEAR, FULL],
}
_OURS = {
    "num_experts": 11,
    "d_ff_expert": 23,
    "num_shared_experts": 1,
    "d_ff_shared": 19,
    "shared_gate": True,
    "norm_eps": 1e-2,
    "qk_norm": QKNorm.head,
    "head_dim": 16,
    "rope_fraction": 0.25,
    "attention_gate": True,
    "zero_centered_norms": True,
    "attention_pattern": ("gated_delta", "gated_delta", "grouped_query"),
    "gated_delta": GatedDeltaConfig(KEY_HEADS, 6, 13, 7, 3),
}
_MIXED = {
    "decoder_sparse_step": 2,
    "mlp_only_layers": [1],
    "intermediate_size": 41,
    "num_hidden_layers": 4,
    "layer_types": [FULL, LINEAR, FULL, FULL],
    "norm_topk_prob": False,
}
_MIXED_OURS = {
    "moe_every": 2,
    "first_dense": 3,
    "d_ff": 41,
    "num_layers": 4,
    "attention_pattern": ("grouped_query", "gated_delta", "grouped_query", "grouped_query"),
}
_DENSE, _DENSE_OURS = {"intermediate_size": 41}, {"d_ff": 41, "num_experts": 0}
_ROUTER = TopKOptions(top_k=3, score=Score.softmax, renormalize=True)
_COMMON = {"theirs": _THEIRS, "ours": _OURS, "router": _ROUTER, "rope": {"partial_rotary_factor": 0.25}}
# name -> what hf_families.Family takes
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_COMMON, "name": "Qwen3Next"},
    "qwen3_next_mixed": {
        **_COMMON,
        "name": "Qwen3Next",
        "theirs": {**_THEIRS, **_MIXED},
        "ours": {**_OURS, **_MIXED_OURS},
        "router": replace(_ROUTER, renormalize=False),
    },
    "qwen3_5_moe_text": {**_COMMON, "name": "Qwen3_5Moe", "config": "Qwen3_5MoeText"},
    "qwen3_5_text": {
        **_COMMON,
        "name": "Qwen3_5",
        "config": "Qwen3_5Text",
        "theirs": {**{k: _THEIRS[k] for k in _THEIRS if "expert" not in k and "moe" not in k}, **_DENSE},
        "ours": {**{k: _OURS[k] for k in _OURS if "expert" not in k and "shared" not in k}, **_DENSE_OURS},
        "router": None,
    },
}
LINEAR_ALONE: dict[str, Any] = {  # theirs has no cache for it
    **MODELS["qwen3_next"],
    "theirs": {**_THEIRS, "layer_types": [LINEAR] * 3},
    "ours": {
        **_OURS,
        "attention_pattern": ("gated_delta",),
        "attention_gate": False,
        "rope_fraction": 1.0,
    },
}
MODULES = {"Qwen3Next": "qwen3_next", "Qwen3_5Moe": "qwen3_5_moe", "Qwen3_5": "qwen3_5"}


class _WideTorch:
    """torch, whose fp32 is fp64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def wide(name: str, dtype: torch.dtype) -> Iterator[None]:
    """Of fp64: a context in which transformers' models of class ``name`` compute in it, and not in fp32."""
    with pytest.MonkeyPatch.context() as patch:
        if name in MODULES and dtype is torch.float64:
            module = f"transformers.models.{MODULES[name]}.modeling_{MODULES[name]}"
            patch.setattr(importlib.import_module(module), "torch", _WideTorch())
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def slow_decay(model: torch.nn.Module) -> None:
    """A state that is not forgotten at once, as transformers' own first values have it."""
    for name, parameter in model.named_parameters():
        if name.endswith((".A_log", ".dt_bias")):
            parameter.sub_(2.0)


@st.composite
def hybrids(draw: st.DrawFn, layers: int) -> dict[str, Any]:
    """Keys of a decoder that has some layers of gated attention, some of the delta rule, or both."""
    kinds = st.sampled_from(["gated_delta", "grouped_query"])
    every = draw(st.lists(kinds, min_size=layers, max_size=layers))
    period = next(p for p in range(1, layers + 1) if every == [every[i % p] for i in range(layers)])
    keys: dict[str, Any] = {"zero_centered_norms": True}
    if "gated_delta" in every:
        heads = draw(st.integers(1, 3))
        sizes = (draw(st.integers(1, 4)) for _ in range(3))
        keys["gated_delta"] = GatedDeltaConfig(heads, heads * draw(st.integers(1, 3)), *sizes)
        keys["attention_pattern"] = tuple(every[:period])
    if "grouped_query" in every:
        keys |= {"attention_gate": True, "qk_norm": QKNorm.head, "head_dim": 8}
        keys["rope_fraction"] = draw(st.sampled_from([0.25, 0.5, 1.0]))
    return keys
