"""Qwen3.5, its language model: Qwen3-Next's layers, all of them dense, projections stored apart
(Qwen team 2026).
"""

from __future__ import annotations

from typing import Any

from moetrain.models.hf.family import ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.hybrid import DEFAULTS, LEFT_OUT, HybridFamily, read_hybrid, write_hybrid
from moetrain.models.hf.qwen3_5_moe_text import projections
from moetrain.models.hf.translate import read_experts, require_dense


def _read(fields: Fields) -> ModelSpec:
    return ModelSpec(read_hybrid(fields), experts=read_experts(fields))


def _write(spec: ModelSpec) -> dict[str, Any]:
    require_dense(spec)
    return write_hybrid(spec)


register_family(
    HybridFamily(
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        _read,
        _write,
        defaults=DEFAULTS | {"num_key_value_heads": 4},
        left_out=LEFT_OUT,
        projections=projections,
    )
)
