"""One architecture, small: transformers' model and ours with the same weights.

Importing it skips a test file where transformers is missing. Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hf_hybrid import slow_decay, wide
from hf_weights import from_hf
from torch import Tensor

from moetrain.models import Decoder
from moetrain.models.options import ModelConfig
from moetrain.models.rope_options import RopeKind, RopeScaling
from moetrain.moe.options import Activation, Backend, ExpertsConfig
from moetrain.moe.routers.topk import TopKOptions

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: hf)")

BATCH, SEQ, VOCAB = 3, 11, 97
_BIAS = ".e_score_correction_bias"
THETA = 5000.0
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 31,
    "head_dim": 14,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "pad_token_id": None,  # a padding token's embedding would get no gradient
    "eos_token_id": None,
}
OURS = {
    "d_model": 31,
    "head_dim": 14,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "tie_embeddings": False,
    "rope_theta": THETA,
}


@dataclass(frozen=True)
class Family:
    """transformers' config and ours, less what all share. ``router`` None: a dense model."""

    name: str
    theirs: dict[str, Any]
    ours: dict[str, Any]
    router: TopKOptions | None = None
    activation: Activation = Activation.swiglu
    expert_bias: bool = False
    rope: dict[str, Any] = field(default_factory=dict)  # transformers' rope_parameters
    seq: int = SEQ
    config: str = ""  # of its class, where another name than the model's

    def their_model(self, dtype: torch.dtype) -> Any:
        """transformers' model with random weights, norms and biases included."""
        with wide(self.name, dtype):
            return self._their_model(dtype)

    def _their_model(self, dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        by_kind = "full_attention" in self.rope
        rope = self.rope if by_kind else {"rope_type": "default", "rope_theta": THETA, **self.rope}
        options = {"tie_word_embeddings": False, "initializer_range": 0.2, **SHAPE, **self.theirs}
        config = getattr(transformers, f"{self.config or self.name}Config")(**options, rope_parameters=rope)
        config._attn_implementation = config._experts_implementation = "eager"
        theirs = getattr(transformers, f"{self.name}ForCausalLM")(config).to(dtype)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.rand_like(parameter) - 0.5)
                if name.endswith("proj_bias"):  # of experts; beyond the limit of a clamped activation, too
                    parameter.add_(16 * (torch.rand_like(parameter) - 0.5))
            slow_decay(theirs)
            for buffer in _biases(theirs).values():  # so that they change choices
                buffer.add_((torch.rand_like(buffer) - 0.5) * 0.4)
        return theirs

    def build(self, dtype: torch.dtype, backend: str = "loop") -> tuple[Any, Decoder]:
        theirs = self.their_model(dtype)
        cfg = ModelConfig(**{**OURS, "num_experts": 0 if self.router is None else 7, **self.ours})
        experts = ExpertsConfig(activation=self.activation, backend=Backend(backend), bias=self.expert_bias)
        ours = Decoder(cfg, self.router or TopKOptions(), experts, VOCAB).to(dtype)
        weights = dict(theirs.named_parameters())
        weights |= {name: bias.flatten() for name, bias in _biases(theirs).items()}
        missing, unexpected = ours.load_state_dict(from_hf(weights), strict=False)
        assert unexpected == []
        assert all(name.endswith("router.bias_E") for name in missing)
        return theirs, ours

    def batch(self) -> tuple[Tensor, Tensor]:
        """(ids, labels) [B, S]: a fifth of the labels ask for nothing."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(VOCAB, (BATCH, self.seq), generator=generator)
        return ids, ids.where(torch.rand(BATCH, self.seq, generator=generator) > 0.2, -100)


def _biases(theirs: Any) -> dict[str, Tensor]:
    """Those of routers' choices, which no gradient moves."""
    found = {**dict(theirs.named_buffers()), **dict(theirs.named_parameters())}
    return {name: tensor for name, tensor in found.items() if name.endswith(_BIAS)}


LONG, ORIGINAL = 41, 29  # positions of a scaled rope: more than it was made for


def scaled(family: Family, theirs: dict[str, Any], ours: RopeScaling) -> Family:
    """The family with long sequences and a scaled rope; the original length is in neither argument."""
    rope = {"rope_type": ours.kind.name, "factor": ours.factor, **theirs}
    if ours.kind is not RopeKind.linear:
        rope["original_max_position_embeddings"] = ORIGINAL
        ours = replace(ours, original_max_positions=ORIGINAL)
    return replace(
        family,
        theirs={**family.theirs, "max_position_embeddings": int(ours.factor * ORIGINAL)},
        ours={**family.ours, "rope_scaling": ours},
        rope=rope,
        seq=LONG,
    )
