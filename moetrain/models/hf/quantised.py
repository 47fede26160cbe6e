"""Checkpoints of quantised weights, shown as the weights that they stand for: ``quantization_config``.

A kind is a function that shows one source as another, under its method's name; one file a kind.
"""

from __future__ import annotations

from collections.abc import Callable

from moetrain.models.hf.fp8 import BlockFp8
from moetrain.models.hf.mxfp4 import Mxfp4
from moetrain.models.hf.tensors import Source

KINDS: dict[str, Callable[[Source], Source]] = {"fp8": BlockFp8, "mxfp4": Mxfp4}


def dequantised(source: Source) -> Source:
    """``source``, or what its weights stand for where its config names a known method.

    Any other ``quantization_config`` stays where it is, and is refused with the config.
    """
    said = source.config.get("quantization_config")
    method = said.get("quant_method") if isinstance(said, dict) else None
    kind = KINDS.get(method) if isinstance(method, str) else None
    return source if kind is None else kind(source)
