"""``moetrain export``: out to Hugging Face."""

from __future__ import annotations

from moetrain.commands.composed import composed
from moetrain.config.validate import validate_export
from moetrain.convert.options import ExportConfig


def run(args: list[str]) -> int:
    cfg = composed("export", ExportConfig, args)
    if cfg is None:
        return 0
    validate_export(cfg)
    from moetrain.config.stored import trained_config
    from moetrain.convert.exporting import export

    return export(cfg, trained_config)
