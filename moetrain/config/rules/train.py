"""Rules about optimizer, schedule, layout, device, run folder and comparison; and about generating."""

from __future__ import annotations

import os
import re
import shutil

from moetrain.config.rules.checks import check_device, is_installed
from moetrain.errors import UserError
from moetrain.models.options import AttentionBackend
from moetrain.nearest import nearest
from moetrain.train.optim.rules import check_optim, check_schedule
from moetrain.train.options import GenerateConfig, Precision, Residual, TrainConfig

_TRACKER_PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard"}  # module -> extra of the same project
_COMPILERS = ("g++", "clang++", "c++")


def optimizer_is_possible(cfg: TrainConfig, world: int) -> None:
    check_optim(cfg.optim)


def schedule_is_possible(cfg: TrainConfig, world: int) -> None:
    check_schedule(cfg.schedule)


def experts_spread_evenly(cfg: TrainConfig, world: int) -> None:
    ep, experts = cfg.parallel.ep, cfg.model.num_experts
    if ep == 1:
        return
    if not experts:
        raise UserError(f"parallel.ep={ep} needs experts, but model.num_experts=0: set parallel.ep=1")
    if experts % ep:
        raise UserError(f"parallel.ep={ep} does not divide model.num_experts={experts}")
    shard = world // cfg.parallel.dp_replicate if cfg.parallel.dp_shard is None else cfg.parallel.dp_shard
    if shard % ep:
        raise UserError(
            f"parallel.ep={ep} borrows ranks of parallel.dp_shard, but does not divide its {shard}: "
            f"start a multiple of {ep * cfg.parallel.dp_replicate} ranks"
        )


def layout_fills_world(cfg: TrainConfig, world: int) -> None:
    replicate, shard = cfg.parallel.dp_replicate, cfg.parallel.dp_shard
    if shard is None and world % replicate:
        raise UserError(f"parallel.dp_replicate={replicate} does not divide the {world} ranks of this run")
    if shard is not None and replicate * shard != world:
        raise UserError(
            f"parallel.dp_replicate={replicate} times parallel.dp_shard={shard} is {replicate * shard}, "
            f"but this run has {world} ranks: set parallel.dp_shard=null to fill them, "
            "or start torchrun with as many"
        )


def global_batch_is_whole_micro_batches(cfg: TrainConfig, world: int) -> None:
    micro, seq, tokens = cfg.train.micro_batch_size, cfg.data.seq_len, cfg.train.global_batch_tokens
    unit = micro * seq * world
    if 0 < tokens < unit and tokens % (seq * world) == 0:
        return  # each rank's share is one micro-batch, smaller than asked: more ranks need no other option
    if tokens % unit:
        below, above = tokens // unit * unit, (tokens // unit + 1) * unit
        nearest = f"{below} or {above}" if below else str(above)
        raise UserError(
            f"train.global_batch_tokens={tokens} is no multiple of {unit} = train.micro_batch_size={micro} x "
            f"data.seq_len={seq} x {world} ranks: the nearest that are: {nearest}"
        )


def device_is_there(cfg: TrainConfig, world: int) -> None:
    check_device("train.device", cfg.train.device)


def residual_is_of_bf16(cfg: TrainConfig, world: int) -> None:
    t = cfg.train
    if t.residual is Residual.fp32 and t.precision is not Precision.bf16:
        raise UserError(
            f"train.residual=fp32 is of train.precision=bf16, not of {t.precision.value}: set "
            "train.residual=same, which is the activations' precision"
        )


def compiler_is_there(cfg: TrainConfig, world: int) -> None:
    if not cfg.train.compile:
        return
    wanted = [os.environ["CXX"].split()[0]] if os.environ.get("CXX", "").strip() else list(_COMPILERS)
    if not any(shutil.which(c) for c in wanted):
        raise UserError(
            f"train.compile=true needs a C++ compiler, and there is none ({', '.join(wanted)}): "
            "install one (Debian: apt install g++), or set train.compile=false"
        )


def compiler_is_right(cfg: TrainConfig, world: int) -> None:
    if not cfg.train.compile:
        return
    import torch

    from moetrain.compat import COMPILES_FROM, compiles_gradients

    if not compiles_gradients(torch.__version__):  # imported late: composing a config needs no torch
        raise UserError(
            f"train.compile=true: torch {torch.__version__} compiles gradients wrongly: install "
            f"{'.'.join(map(str, COMPILES_FROM))} or newer, or set train.compile=false"
        )


def attention_fits_device(cfg: TrainConfig, world: int) -> None:
    """What the device has not, without a test on it."""
    if cfg.model.attention_backend is AttentionBackend.auto:
        return
    import torch

    from moetrain.models.attention import require_backend
    from moetrain.train.run import resolve_device

    dtype = {Precision.bf16: torch.bfloat16, Precision.fp64: torch.float64}.get(cfg.train.precision)
    device = torch.device(resolve_device(cfg.train.device))
    require_backend(cfg.model, cfg.data.seq_len, dtype or torch.float32, device, tested=False)


def task_is_known(cfg: TrainConfig, world: int) -> None:
    from moetrain.train.task import TASKS

    if (name := cfg.train.task) not in TASKS:
        raise UserError(
            f"train.task={name} is not known{nearest(name, TASKS)}; a plugin's task needs plugins=[package] "
            "on the command line"
        )


def engine_is_known(cfg: TrainConfig, world: int) -> None:
    from moetrain.train.engine import ENGINES

    if cfg.engine.name not in ENGINES:
        raise UserError(f"engine.name={cfg.engine.name} is not known; known: {', '.join(sorted(ENGINES))}")


def tracker_is_installed(cfg: TrainConfig, world: int) -> None:
    package = _TRACKER_PACKAGES.get(cfg.tracker.name)
    if package and not is_installed(package):
        raise UserError(
            f"tracker={cfg.tracker.name} needs the package {package}, which is not installed: "
            f"pip install 'moetrain[{package}]', or set tracker=jsonl"
        )


def run_folder_is_sane(cfg: TrainConfig, world: int) -> None:
    for key, value in (("name", cfg.run.name), ("dir", cfg.run.dir), ("root", cfg.run.root)):
        if value is not None and not value.strip():
            raise UserError(f"run.{key} is empty: give it a value, or leave it out")
    name = cfg.run.name
    if name is not None and (os.path.isabs(name) or ".." in name.split("/")):
        raise UserError(
            f"run.name={name} must be a folder below run.root={cfg.run.root}; for a path set run.dir"
        )
    folder = cfg.run.dir or cfg.run.root
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"run.{'dir' if cfg.run.dir else 'root'}={folder} is a file, not a folder")


def resume_exists(cfg: TrainConfig, world: int) -> None:
    if cfg.resume not in ("auto", "none") and not os.path.exists(cfg.resume):
        raise UserError(f"resume={cfg.resume} does not exist: give auto, none, or the path of a checkpoint")


def optimizer_starts_somewhere(cfg: TrainConfig, world: int) -> None:
    if cfg.init_optimizer and cfg.init_from is None:
        raise UserError("init_optimizer=true needs init_from: the folder that holds the optimizer's state")


def comparison_is_sane(cfg: TrainConfig, world: int) -> None:
    compare = cfg.compare
    if not compare.arms:
        return
    if not compare.seeds or len(set(compare.seeds)) < len(compare.seeds) or min(compare.seeds) < 0:
        raise UserError(f"compare.seeds={compare.seeds} must be at least one seed of 0 or more, each once")
    for name in compare.arms:
        if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
            raise UserError(f"compare.arms.{name}: an arm names a folder: letters, digits, _ . + - only")


def ends_with_its_schedule(cfg: TrainConfig) -> str | None:
    steps, horizon = cfg.train.steps, cfg.schedule.horizon
    if steps == horizon:
        return None
    after = (
        "stops before the schedule ends" if steps < horizon else "goes on after it at the last learning rate"
    )
    return f"train.steps={steps} but schedule.horizon={horizon}: training {after}"


def generate_device(cfg: GenerateConfig) -> None:
    check_device("device", cfg.device)


def generate_prompt(cfg: GenerateConfig) -> None:
    if (cfg.prompt is None) == (cfg.prompt_file is None):
        raise UserError("give exactly one of prompt=... and prompt_file=...")
    if cfg.prompt_file is not None and not os.path.isfile(cfg.prompt_file):
        raise UserError(f"prompt_file={cfg.prompt_file} is no file")


def generate_checkpoint(cfg: GenerateConfig) -> None:
    if not os.path.isdir(cfg.checkpoint):
        raise UserError(
            f"checkpoint={cfg.checkpoint} does not exist: give a run folder or one of its checkpoints"
        )


LAYOUT_RULES = (task_is_known, optimizer_is_possible, layout_fills_world, experts_spread_evenly)
RULES = (
    schedule_is_possible,
    *LAYOUT_RULES,
    global_batch_is_whole_micro_batches,
    device_is_there,
    residual_is_of_bf16,
    compiler_is_there,
    compiler_is_right,
    attention_fits_device,
    engine_is_known,
    tracker_is_installed,
    run_folder_is_sane,
    resume_exists,
    optimizer_starts_somewhere,
    comparison_is_sane,
)
WARNINGS = (ends_with_its_schedule,)
GENERATE_RULES = (generate_device, generate_prompt, generate_checkpoint)
