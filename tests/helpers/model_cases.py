"""Small decoders for the model's tests: sizes are distinct and mostly prime, so that none passes for another.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moetrain.models import Decoder
from moetrain.models.options import ModelConfig
from moetrain.moe.options import Backend, ExpertsConfig
from moetrain.moe.routers.topk import TopKOptions

VOCAB = 41
TINY = ModelConfig(
    d_model=23,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    d_ff=29,
    num_experts=5,
    d_ff_expert=13,
    init_std=0.3,
)


def decoder(dtype: torch.dtype = torch.float64, seed: int = 0, top_k: int = 2, **changes: Any) -> Decoder:
    """A seeded decoder whose norms' weights differ from 1; ``changes`` are keys of ModelConfig."""
    torch.manual_seed(seed)
    experts = ExpertsConfig(backend=Backend.loop)
    model = Decoder(replace(TINY, **changes), TopKOptions(top_k=top_k), experts, VOCAB).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter) - 0.5)
    return model


def tokens(batch: int, seq: int, seed: int = 1) -> Tensor:
    """int64 [B, S]."""
    return torch.randint(VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))
