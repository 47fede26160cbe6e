"""What the model in any of the folders that commands take is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.errors import UserError
from moetrain.train.run_files import CONFIG, TOKENIZER

if TYPE_CHECKING:
    from moetrain.models.hf.family import ModelSpec


def read_spec(path: Path, key: str = "init_from") -> ModelSpec:
    """What the model in a run folder, a converted one or a Hugging Face folder is; ``key`` named it."""
    from moetrain.models.hf import ModelSpec
    from moetrain.models.hf.source import read_folder_spec

    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(
            f"{key}={path} {what}: give a run folder, a folder made by moetrain convert or upcycle, or a "
            "Hugging Face folder (a GGUF file: moetrain convert it first)"
        )
    if (path / CONFIG).is_file():
        from moetrain.train.run_config import run_config

        cfg = run_config(path)
        model = cfg.model
        if model.vocab_size is None:
            from moetrain.data import load_tokenizer

            model = replace(model, vocab_size=load_tokenizer(path / TOKENIZER).vocab_size)
        return ModelSpec(model, cfg.router, cfg.experts)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{key}={path} holds neither config.yaml (a run folder) nor config.json (Hugging Face)"
        )
    return read_folder_spec(path)
