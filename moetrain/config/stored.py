"""What a folder holds: a run's config, held against its checkpoint before anything is built from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moetrain.checkpoint.read import CHECKPOINTS, listing, read_metadata, run_of, step_folder, steps_in
from moetrain.checkpoint.state_dict import MODEL, model_tensors
from moetrain.config.hydra.compose import load_yaml
from moetrain.config.validate import validate_stored
from moetrain.data import load_tokenizer
from moetrain.errors import UserError
from moetrain.models.decoder import Decoder
from moetrain.models.hf import ModelSpec
from moetrain.models.hf.source import read_folder_spec
from moetrain.models.options import AttentionBackend, ModelConfig
from moetrain.train.identity import require_same_files
from moetrain.train.options import TrainConfig
from moetrain.train.run_files import CONFIG, TOKENIZER

Shapes = Mapping[str, tuple[int, ...]]

_LAYERS = 10_000  # of a model whose folder has no checkpoint to compare with
_WIDTHS = ("d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "d_ff_expert", "d_ff_shared")
_COUNTS = ("vocab_size", "num_experts", "num_shared_experts")


def trained_config(checkpoint: Path) -> TrainConfig:
    """The config of the run folder that ``checkpoint`` lies in, which was not changed since it was written.

    Raises UserError that names the file and the key, as :func:`run_config` does.
    """
    require_same_files(checkpoint, load_yaml)
    return run_config(run_of(checkpoint))


def run_config(run_dir: Path) -> TrainConfig:
    """The config in ``run_dir``, which describes a model that can be built, the one in its newest checkpoint.

    Its attention backend was chosen for the machine of the run, so here it is ``auto``.

    Raises UserError that names the file and the key. Building takes time and memory only as the checkpoint's
    files do, whatever numbers the config holds.
    """
    where = str(run_dir / CONFIG)
    cfg = load_yaml(run_dir / CONFIG)
    checkpoint, shapes = _newest(run_dir)
    _check_numbers(cfg.model, shapes, where)
    validate_stored(cfg, where)
    if shapes:
        _check_shapes(cfg, shapes, where, checkpoint)
    return replace(cfg, model=replace(cfg.model, attention_backend=AttentionBackend.auto))


def read_spec(path: Path, key: str = "init_from") -> ModelSpec:
    """What the model in a run folder, a converted one or a Hugging Face folder is; ``key`` named it."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(
            f"{key}={path} {what}: give a run folder, a folder made by moetrain convert or upcycle, or a "
            "Hugging Face folder (a GGUF file: moetrain convert it first)"
        )
    if (path / CONFIG).is_file():
        cfg = run_config(path)
        vocab_size = cfg.model.vocab_size or load_tokenizer(path / TOKENIZER).vocab_size
        return ModelSpec(replace(cfg.model, vocab_size=vocab_size), cfg.router, cfg.experts)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{key}={path} holds neither config.yaml (a run folder) nor config.json (Hugging Face)"
        )
    return read_folder_spec(path)


def _newest(run_dir: Path) -> tuple[Path | None, Shapes]:
    """The newest checkpoint that says what it holds, and the shapes of its model's tensors."""
    for folder in (run_dir / CHECKPOINTS, run_dir):
        for step in reversed(steps_in(folder)):
            path = step_folder(folder, step)
            metadata, complaint = read_metadata(path)
            entries: dict[str, Any] = dict(metadata.state_dict_metadata)
            shapes = {name: tuple(entry.size) for name, entry in entries.items() if name.startswith(MODEL)}
            if complaint is None and shapes:
                return path, shapes
    return None, {}


def _check_numbers(model: ModelConfig, shapes: Shapes, where: str) -> None:
    """No number exceeds what the stored tensors allow: only then is it safe to count or build anything."""
    layers = len(shapes) if shapes else _LAYERS
    if model.num_layers > layers:
        have = f"its checkpoint holds {layers} tensors" if shapes else f"at most {layers} can be read"
        raise UserError(f"{where}: model.num_layers={_short(model.num_layers)}, but {have}")
    values = sum(math.prod(shape) for shape in shapes.values()) if shapes else 2**40
    for name in (*_WIDTHS, *_COUNTS):
        if (value := getattr(model, name)) is not None and value > values:
            have = f"its checkpoint holds {values} values" if shapes else f"at most {values} can be read"
            raise UserError(f"{where}: model.{name}={_short(value)}, but {have}")


def _check_shapes(cfg: TrainConfig, shapes: Shapes, where: str, checkpoint: Path | None) -> None:
    vocab_size = cfg.model.vocab_size or (*shapes.get(f"{MODEL}embed_VD", ()), 1)[0]
    try:
        with torch.device("meta"):
            model = Decoder(cfg.model, cfg.router, cfg.experts, vocab_size)
    except (UserError, ValueError, ArithmeticError, RuntimeError, TypeError) as error:
        raise UserError(f"{where}: no model can be built from it: {str(error).splitlines()[0]}") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}
    differing = [
        f"{name} is {list(shapes[name]) if name in shapes else 'missing'} there"
        f" and {list(wanted[name]) if name in wanted else 'missing'} by the config"
        for name in sorted(wanted.keys() | shapes.keys())
        if wanted.get(name) != shapes.get(name)
    ]
    if differing:
        raise UserError(
            f"{where} describes another model than {checkpoint} holds: {listing(differing, '; ')}"
        )


def _short(value: int) -> str:
    return str(value) if abs(value) < 10**18 else f"{value:.3e}" if abs(value) < 10**300 else "a huge number"
