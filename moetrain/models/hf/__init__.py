"""Hugging Face checkpoints: one file a family, and the tables by which tensors move both ways."""

from moetrain.models.hf import (  # noqa: F401  (each registers its family)
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5_moe,
    gemma3_text,
    glm4_moe,
    gpt_oss,
    granitemoe,
    hunyuan_v1_moe,
    kimi_k2,
    llama,
    minimax_m2,
    mistral,
    mixtral,
    olmoe,
    own,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5_moe_text,
    qwen3_5_text,
    qwen3_moe,
    qwen3_next,
)
from moetrain.models.hf.family import FAMILIES, Family, ModelSpec, families_for, family_of
from moetrain.models.hf.fields import Fields

__all__ = ["FAMILIES", "Family", "Fields", "ModelSpec", "families_for", "family_of"]
