"""Kimi-K2: DeepSeek-V3's model under another name (Kimi Team 2025, arXiv:2507.20534).

transformers has no class of that name without the code beside the weights, and one of the same model as
``deepseek_v3``: so it is written.
"""

from __future__ import annotations

from typing import NoReturn

from moetrain.models.hf.deepseek_v3 import V3_DEFAULTS, read_v3
from moetrain.models.hf.family import CannotExpressError, Family, ModelSpec, register_family
from moetrain.models.hf.latent import FUTURE
from moetrain.models.hf.sigmoid_moe import NAMES


def _write(spec: ModelSpec) -> NoReturn:
    raise CannotExpressError("it is written as deepseek_v3, the same model")


register_family(
    Family(
        "kimi_k2",
        "DeepseekV3ForCausalLM",
        read_v3,
        _write,
        NAMES,
        defaults=V3_DEFAULTS,
        future_layers=FUTURE,
    )
)
