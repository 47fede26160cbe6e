"""``moetrain convert``: a Hugging Face folder or a GGUF file in."""

from __future__ import annotations

from moetrain.commands.composed import composed
from moetrain.config.hydra.compose import compose_train
from moetrain.convert.options import ConvertConfig


def run(args: list[str]) -> int:
    cfg = composed("convert", ConvertConfig, args)
    if cfg is None:
        return 0
    from moetrain.convert.importing import convert

    return convert(cfg, defaults=compose_train([]))
