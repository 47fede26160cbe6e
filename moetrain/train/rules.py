"""What training and generating refuse of their settings."""

from __future__ import annotations

import os
import re
import shutil

import torch

from moetrain.bounds import check_ranges
from moetrain.compat import COMPILES_FROM, compiles_gradients
from moetrain.errors import UserError
from moetrain.train.options import (
    CompareConfig,
    GenerateConfig,
    LoopConfig,
    Precision,
    Residual,
    RunConfig,
)

_DEVICES = ("auto", "cpu", "cuda")
_COMPILERS = ("g++", "clang++", "c++")


def check_loop(cfg: LoopConfig) -> None:
    """Raise UserError for the first setting that is out of its range, or that this machine cannot do."""
    check_ranges(cfg, "train")
    check_device("train.device", cfg.device)
    if cfg.residual is Residual.fp32 and cfg.precision is not Precision.bf16:
        raise UserError(
            f"train.residual=fp32 is of train.precision=bf16, not of {cfg.precision.value}: set "
            "train.residual=same, which is the activations' precision"
        )
    if cfg.compile:
        _check_compiler()


def check_batch(cfg: LoopConfig, seq_len: int, world: int) -> None:
    """Raise UserError where the tokens of a step are no whole micro-batches of every rank."""
    micro, tokens = cfg.micro_batch_size, cfg.global_batch_tokens
    unit = micro * seq_len * world
    if 0 < tokens < unit and tokens % (seq_len * world) == 0:
        return  # each rank's share is one micro-batch, smaller than asked: more ranks need no other option
    if tokens % unit:
        below, above = tokens // unit * unit, (tokens // unit + 1) * unit
        nearest = f"{below} or {above}" if below else str(above)
        raise UserError(
            f"train.global_batch_tokens={tokens} is no multiple of {unit} = train.micro_batch_size={micro} x "
            f"data.seq_len={seq_len} x {world} ranks: the nearest that are: {nearest}"
        )


def check_device(key: str, device: str) -> None:
    """Raise UserError unless the device is known and there."""
    if device not in _DEVICES:
        raise UserError(f"{key}={device} is not known; known: {', '.join(_DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"{key}=cuda, but torch {torch.__version__} sees no CUDA device: set {key}=auto or cpu"
        )


def check_run(cfg: RunConfig) -> None:
    """Raise UserError where the run folder has no sensible name, or is a file."""
    for key, value in (("name", cfg.name), ("dir", cfg.dir), ("root", cfg.root)):
        if value is not None and not value.strip():
            raise UserError(f"run.{key} is empty: give it a value, or leave it out")
    if cfg.name is not None and (os.path.isabs(cfg.name) or ".." in cfg.name.split("/")):
        raise UserError(
            f"run.name={cfg.name} must be a folder below run.root={cfg.root}; for a path set run.dir"
        )
    folder = cfg.dir or cfg.root
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"run.{'dir' if cfg.dir else 'root'}={folder} is a file, not a folder")


def check_compare(cfg: CompareConfig) -> None:
    """Raise UserError for seeds that are none, or alike, and for arms that name no folder."""
    if not cfg.arms:
        return
    if not cfg.seeds or len(set(cfg.seeds)) < len(cfg.seeds) or min(cfg.seeds) < 0:
        raise UserError(f"compare.seeds={cfg.seeds} must be at least one seed of 0 or more, each once")
    for name in cfg.arms:
        if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
            raise UserError(f"compare.arms.{name}: an arm names a folder: letters, digits, _ . + - only")


def check_generate(cfg: GenerateConfig) -> None:
    """Raise UserError for the first setting of ``moetrain generate`` that is not possible."""
    check_ranges(cfg)
    check_device("device", cfg.device)
    if (cfg.prompt is None) == (cfg.prompt_file is None):
        raise UserError("give exactly one of prompt=... and prompt_file=...")
    if cfg.prompt_file is not None and not os.path.isfile(cfg.prompt_file):
        raise UserError(f"prompt_file={cfg.prompt_file} is no file")
    if not os.path.isdir(cfg.checkpoint):
        raise UserError(
            f"checkpoint={cfg.checkpoint} does not exist: give a run folder or one of its checkpoints"
        )


def _check_compiler() -> None:
    wanted = [os.environ["CXX"].split()[0]] if os.environ.get("CXX", "").strip() else list(_COMPILERS)
    if not any(shutil.which(c) for c in wanted):
        raise UserError(
            f"train.compile=true needs a C++ compiler, and there is none ({', '.join(wanted)}): "
            "install one (Debian: apt install g++), or set train.compile=false"
        )
    if not compiles_gradients(torch.__version__):
        raise UserError(
            f"train.compile=true: torch {torch.__version__} compiles gradients wrongly: install "
            f"{'.'.join(map(str, COMPILES_FROM))} or newer, or set train.compile=false"
        )
