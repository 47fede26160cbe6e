"""The feed-forward layers without a dispatch of tokens, small, with what each needs of a config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from model_cases import TINY, VOCAB
from torch import Tensor, nn

from moetrain.models import Decoder
from moetrain.models.feed_forward import build_feed_forward
from moetrain.models.layer_options import (
    AvgKConfig,
    BlockWeight,
    Decomposition,
    MergingConfig,
    MonetConfig,
    ProductKeysConfig,
)
from moetrain.moe.options import Activation, Backend, ExpertsConfig, RouterConfig

LOOK_UP = ProductKeysConfig(heads=3, top_k=5, d_query=10)
PAIRS = MonetConfig(Decomposition.vertical, heads=3, top_k=2, share=2)
# name -> (keys of ModelConfig, the experts' activation)
LAYERS: dict[str, tuple[dict[str, Any], Activation]] = {
    "peer": ({"num_experts": 49, "product_keys": LOOK_UP}, Activation.gelu),
    "pkm": ({"num_experts": 49, "product_keys": LOOK_UP}, Activation.swiglu),
    "moe_x": ({}, Activation.relu),
    "monet": ({"num_experts": 49, "monet": PAIRS}, Activation.relu2),
}
MERGING = MergingConfig(segment=4, expert_dropout=0.2, token_reduction=5)
LAYERS["smear"] = ({"merging": MERGING}, Activation.swiglu)
LAYERS["avg_k"] = ({"avg_k": AvgKConfig(BlockWeight.score)}, Activation.relu)
LAYERS["meo"] = ({"merging": MERGING}, Activation.gelu)
LAYERS["s2moe"] = ({}, Activation.swiglu)
# the same on the command line
_FEW = ["model.num_experts=25", "model.product_keys.d_query=6", "model.product_keys.top_k=7"]
COMMAND = {
    "peer": ["model=peer", *_FEW],
    "pkm": ["model=pkm", "model.moe_every=2", *_FEW],
    "moe_x": ["model=moe_x"],
    "avg_k": ["model=avg_k"],
    "smear": ["model=smear", "model.merging.segment=4"],
    "meo": ["model=meo", "model.merging.segment=4"],
    "s2moe": ["model=s2moe"],
    "monet": ["model=monet", "model.num_experts=49", "model.monet.top_k=3", "model.monet.heads=3"],
}


def layer_decoder(name: str, seed: int = 0, **changes: Any) -> Decoder:
    """In fp64; no norm or bias keeps its first value, nor does any statistic."""
    keys, activation = LAYERS[name]
    torch.manual_seed(seed)
    experts = ExpertsConfig(activation=activation, backend=Backend.loop)
    cfg = replace(TINY, feed_forward=name, **(keys | changes))
    return stirred(Decoder(cfg, RouterConfig(), experts, VOCAB).double())


def layer(name: str, seed: int = 0, place: int = 0, **changes: Any) -> nn.Module:
    """One layer alone, likewise."""
    keys, activation = LAYERS[name]
    torch.manual_seed(seed)
    cfg = replace(TINY, feed_forward=name, **(keys | changes))
    experts = ExpertsConfig(activation=activation, backend=Backend.loop)
    return stirred(build_feed_forward(name, cfg, RouterConfig(), experts, place).double())


def stirred(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(torch.rand_like(parameter) - 0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("mean_X"):
                buffer.copy_(torch.rand_like(buffer) - 0.5)
            if name.endswith("variance_X"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return module


def inputs(batch: int = 2, seq: int = 7, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(batch, seq, TINY.d_model, generator=generator, dtype=torch.float64)
    return drawn.requires_grad_()
