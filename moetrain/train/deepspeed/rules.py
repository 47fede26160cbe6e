"""What ``engine=deepspeed`` refuses, before a process group or a folder is made."""

from __future__ import annotations

from moetrain.errors import UserError
from moetrain.moe.routers import ROUTERS
from moetrain.packages import is_installed
from moetrain.train.deepspeed.config import merged_config
from moetrain.train.deepspeed.options import DeepSpeedConfig
from moetrain.train.optim.options import AdamW8bitConfig, MuonConfig, Tables
from moetrain.train.options import Precision, TrainConfig


def check_engine(cfg: TrainConfig) -> None:
    """Raise UserError where ``engine=deepspeed`` cannot do what ``cfg`` asks for, or is not installed."""
    engine = cfg.engine
    if not isinstance(engine, DeepSpeedConfig):
        return
    _check_settings(cfg, engine)
    merged_config(engine)
    if not is_installed("deepspeed"):
        raise UserError(
            "engine=deepspeed needs the package deepspeed, which is not installed: "
            "pip install 'moetrain[deepspeed]', or set engine=native"
        )


def _check_settings(cfg: TrainConfig, engine: DeepSpeedConfig) -> None:
    stage = engine.zero_stage
    if stage == 3 and cfg.parallel.ep > 1:
        raise UserError(
            f"engine.zero_stage=3 is refused with parallel.ep={cfg.parallel.ep}: it cuts every weight over "
            "all ranks, but spread experts differ from rank to rank, and DeepSpeed refuses its MoE layers. "
            "Set parallel.ep=1, engine.zero_stage=2, or engine=native, which cuts spread experts too"
        )
    if cfg.parallel.dp_replicate > 1:
        raise UserError(
            f"parallel.dp_replicate={cfg.parallel.dp_replicate} is of engine=native: ZeRO has one axis of "
            "ranks for what is not spread; set parallel.dp_replicate=1"
        )
    if cfg.train.compile:
        raise UserError("train.compile=true is of engine=native: set train.compile=false")
    if cfg.train.precision is Precision.fp64 and stage:
        raise UserError(
            f"engine.zero_stage={stage} keeps its master weights in fp32, and train.precision=fp64 cannot: "
            "set engine.zero_stage=0, or train.precision=fp32"
        )
    if isinstance(cfg.optim, AdamW8bitConfig):
        raise UserError("optim=adamw_8bit is of engine=native: set engine=native, or optim=adamw")
    if isinstance(cfg.optim, MuonConfig) and stage:
        raise UserError(
            f"optim=muon needs whole matrices, which engine.zero_stage={stage} cuts at any element: set "
            "engine.zero_stage=0, or optim=adamw"
        )
    if cfg.model.num_experts and ROUTERS[cfg.router.name].cls.freezes:
        raise UserError(
            f"router={cfg.router.name} freezes parameters as it is trained, which engine=deepspeed would "
            "still decay: set engine=native"
        )
    if cfg.optim.tables is not Tables.elementwise and stage:
        raise UserError(
            f"optim.tables={cfg.optim.tables.name} needs whole rows, which engine.zero_stage={stage} cuts at "
            "any element: set engine.zero_stage=0, or optim.tables=elementwise"
        )
    if engine.offload and not stage:
        raise UserError("engine.offload=true is of engine.zero_stage=1, 2 or 3: set engine.zero_stage=1")
