"""Small config.json files of every family, and what is read of them."""

from __future__ import annotations

import json
from typing import Any

from hf_family import transformers

from moetrain.models.hf import FAMILIES, ModelSpec
from moetrain.models.hf.family import read_model

CLASSES = {
    name: family.architecture.replace("ForCausalLM", "Config")
    for name, family in FAMILIES.items()
    if not family.code
} | {  # the plain names are those of models with images
    "qwen3_5_moe_text": "Qwen3_5MoeTextConfig",
    "qwen3_5_text": "Qwen3_5TextConfig",
    "gemma3_text": "Gemma3TextConfig",
}
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 24, "n_routed_experts": 4, "n_shared_experts": 1,
    "moe_num_experts": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}  # fmt: skip

_LATENT = {  # each head has keys of its own, and the width that turns is transformers' head_dim
    "num_key_value_heads": 4, "head_dim": 16, "qk_rope_head_dim": 16, "n_routed_experts": 8,
    "first_k_dense_replace": 1,
}  # fmt: skip
OWN_SIZES = dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2"), _LATENT)


def their_config(name: str, **values: Any) -> Any:
    return getattr(transformers, CLASSES[name])(**values)


def sizes_of(name: str) -> dict[str, Any]:
    """What has no default here, and is a key of the family."""
    known = their_config(name).to_dict()
    experts = {key: n for key, n in EXPERTS.items() if key in known}
    return {"model_type": name, **SIZES, **experts, **OWN_SIZES.get(name, {})}


def read(values: dict[str, Any]) -> ModelSpec:
    return read_model(json.loads(json.dumps(values)), "config.json")[1]
