"""Rules about a whole run that no part of it owns; the parts' own stand beside them."""

from __future__ import annotations

import os

import torch

from moetrain.errors import UserError
from moetrain.models.attention import require_backend
from moetrain.models.options import AttentionBackend
from moetrain.moe.options import Keep
from moetrain.train.optim.options import AdamW8bitConfig
from moetrain.train.options import Precision, TrainConfig


def attention_fits_device(cfg: TrainConfig) -> None:
    """What the device has not, without a test on it."""
    if cfg.model.attention_backend is AttentionBackend.auto:
        return
    from moetrain.train.run import resolve_device  # which asks the edge

    dtype = {Precision.bf16: torch.bfloat16, Precision.fp64: torch.float64}.get(cfg.train.precision)
    device = torch.device(resolve_device(cfg.train.device))
    require_backend(cfg.model, cfg.data.seq_len, dtype or torch.float32, device, tested=False)


def recomputes_once(cfg: TrainConfig) -> None:
    """A recomputed block keeps nothing of its experts anyway; their up projection would run thrice."""
    if cfg.train.recompute and cfg.experts.keep is Keep.inputs:
        raise UserError(
            "experts.keep=inputs with train.recompute=true: a block that is recomputed as a whole keeps only "
            "its own input, and would compute the experts' up projection a third time; leave one of them out"
        )


def moments_fit_8_bits(cfg: TrainConfig) -> None:
    """Their update is in fp32."""
    if isinstance(cfg.optim, AdamW8bitConfig) and cfg.train.precision is Precision.fp64:
        raise UserError(
            "train.precision=fp64 with optim=adamw_8bit, which updates in fp32: set train.precision=fp32, or "
            "optim=adamw"
        )


def start_exists(cfg: TrainConfig) -> None:
    """Of the checkpoint to go on from, and of the optimizer's state to begin with."""
    if cfg.resume not in ("auto", "none") and not os.path.exists(cfg.resume):
        raise UserError(f"resume={cfg.resume} does not exist: give auto, none, or the path of a checkpoint")
    if cfg.init_optimizer and cfg.init_from is None:
        raise UserError("init_optimizer=true needs init_from: the folder that holds the optimizer's state")
    if cfg.init_optimizer and (cfg.experts.frozen or getattr(cfg.router, "held", 0)):
        raise UserError(
            "init_optimizer=true with experts.frozen or router.held: moments that are taken over would go on "
            "moving what is to stay; leave init_optimizer out"
        )


def products_train_alone(cfg: TrainConfig) -> str | None:
    """A warning: matrices are trained together with the products beside them."""
    if cfg.model.lora.rank is None or cfg.optim.frozen:
        return None
    return (
        f"model.lora.rank={cfg.model.lora.rank}, but optim.frozen is empty: the matrices are trained with "
        "the products beside them; optim.frozen=['*','!*.lora_*'] trains the products alone"
    )


def ends_with_its_schedule(cfg: TrainConfig) -> str | None:
    """A warning: the run is longer or shorter than its schedule."""
    steps, horizon = cfg.train.steps, cfg.schedule.horizon
    if steps == horizon:
        return None
    after = (
        "stops before the schedule ends" if steps < horizon else "goes on after it at the last learning rate"
    )
    return f"train.steps={steps} but schedule.horizon={horizon}: training {after}"
