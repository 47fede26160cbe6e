"""A whole config, checked before anything is built or written: ranges first, then what crosses fields.

A rule about one component stands beside it, and the component asks it too. ``rules/`` has those that no
component owns. Each raises UserError with the key, both numbers and what to do.
"""

from __future__ import annotations

from moetrain.bounds import check_ranges
from moetrain.config.rules.balance import balance_fits_the_router, balance_is_accepted
from moetrain.config.rules.future import future_layers_are_proved
from moetrain.config.rules.layers import (
    attention_accepts_its_options,
    attention_is_known,
    feed_forward_is_known,
    feed_forward_is_own,
    layers_accept_their_options,
)
from moetrain.config.rules.model import (
    repair_looks_ahead,
    rounding_looks_ahead,
    router_is_causal,
    routing_group_divides_micro_batch,
    vocabulary_is_large_enough,
)
from moetrain.config.rules.router import (
    router_accepts_its_options,
    router_can_be_replayed,
    router_has_its_task,
)
from moetrain.config.rules.train import (
    attention_fits_device,
    ends_with_its_schedule,
    moments_fit_8_bits,
    products_train_alone,
    recomputes_once,
    start_exists,
)
from moetrain.convert.options import ExportConfig, UpcycleConfig
from moetrain.data.rules import check_data, check_paths
from moetrain.errors import UserError
from moetrain.evaluation.options import EvalConfig
from moetrain.evaluation.rules import check_eval
from moetrain.models.future_rules import check_future
from moetrain.models.rules import check_model
from moetrain.models.wiring_rules import check_wiring
from moetrain.parallel.options import ParallelConfig
from moetrain.parallel.rules import check_layout
from moetrain.train.deepspeed.rules import check_engine
from moetrain.train.engine import engine_of
from moetrain.train.log.rules import check_tracker
from moetrain.train.optim.options import AdamW8bitConfig
from moetrain.train.optim.rules import check_optim, check_schedule
from moetrain.train.options import GenerateConfig, TrainConfig
from moetrain.train.replay import check_replay
from moetrain.train.rules import check_batch, check_compare, check_generate, check_loop, check_run
from moetrain.train.task import task_of
from moetrain.verify.options import VerifyConfig


def validate(cfg: TrainConfig, world: int = 1) -> list[str]:
    """Check ``cfg`` for ``world`` ranks; returns warnings, raises UserError for the first broken rule."""
    check_ranges(cfg)
    _check_model(cfg, world)
    _check_layers(cfg)
    check_data(cfg.data)
    check_paths(cfg.data)
    moments_fit_8_bits(cfg)
    check_schedule(cfg.schedule)
    _check_layout(cfg, world)
    check_batch(cfg.train, cfg.data.seq_len, world)
    check_loop(cfg.train)
    check_replay(cfg.replay)
    router_can_be_replayed(cfg)
    attention_fits_device(cfg)
    recomputes_once(cfg)
    engine_of(cfg.engine.name)
    check_engine(cfg)
    future_layers_are_proved(cfg)
    check_tracker(cfg.tracker)
    check_run(cfg.run)
    start_exists(cfg)
    check_compare(cfg.compare)
    looks_ahead = (router_is_causal(cfg), repair_looks_ahead(cfg), rounding_looks_ahead(cfg))
    others = (router_has_its_task(cfg), ends_with_its_schedule(cfg), products_train_alone(cfg))
    warnings = (*looks_ahead, *others)
    return [text for text in warnings if text is not None]


def validate_verify(cfg: VerifyConfig) -> None:
    """Check a layout that is to be proved, for the ranks it is meant for."""
    check_ranges(cfg)
    if cfg.router.group == "all" and any(loss.scope.name == "micro" for loss in cfg.balance.losses):
        raise UserError(
            "router.group=all couples all ranks, and a loss of scope=micro tells them apart: no single "
            "process does the same; take another scope"
        )
    if isinstance(cfg.optim, AdamW8bitConfig):
        raise UserError(
            "optim=adamw_8bit is not verified: a proof is in fp64, of parameters too small for 8-bit "
            "moments; prove the layout with optim=adamw"
        )
    for name in ("record", "force"):
        if (folder := getattr(cfg.replay, name)) is not None:
            raise UserError(
                f"replay.{name}={folder} is of text, and a proof has tokens of its own: leave it out"
            )
    world = cfg.verify.world or smallest_world(cfg.parallel)
    _check_model(cfg, world)
    _check_layers(cfg)
    _check_layout(cfg, world)
    check_engine(cfg)
    future_layers_are_proved(cfg)


def validate_upcycle(cfg: UpcycleConfig) -> None:
    """Check the model that is to be made, and the text; raises UserError for the first broken rule."""
    check_ranges(cfg)
    attention_is_known(cfg)
    feed_forward_is_own(cfg)
    _check_model(cfg, 1)
    check_data(cfg.data)
    check_paths(cfg.data)


def validate_stored(cfg: TrainConfig, where: str) -> None:
    """Check what a stored config says of its model and its text; ``where`` names the file."""
    try:
        for section in ("model", "router", "experts", "data"):
            check_ranges(getattr(cfg, section), section)
        check_model(cfg.model)
        check_wiring(cfg.model)
        check_future(cfg.model)
        router_accepts_its_options(cfg)
        _check_layers(cfg)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def validate_generate(cfg: GenerateConfig) -> None:
    """Check what ``moetrain generate`` was told; raises UserError for the first broken rule."""
    check_generate(cfg)


def validate_eval(cfg: EvalConfig) -> None:
    """Check what ``moetrain eval`` was told; raises UserError for the first broken rule."""
    check_eval(cfg)


def validate_export(cfg: ExportConfig) -> None:
    """Check what ``moetrain export`` was told; raises UserError for the first broken rule."""
    check_ranges(cfg)


def smallest_world(parallel: ParallelConfig) -> int:
    """The fewest ranks that such a layout can have, two at least."""
    shard = parallel.ep if parallel.dp_shard is None else parallel.dp_shard
    return max(2, parallel.dp_replicate * shard)


def _check_model(cfg: TrainConfig, world: int) -> None:
    check_model(cfg.model)
    check_wiring(cfg.model)
    check_future(cfg.model)
    vocabulary_is_large_enough(cfg)
    router_accepts_its_options(cfg)
    routing_group_divides_micro_batch(cfg, world)
    balance_is_accepted(cfg)
    balance_fits_the_router(cfg)


def _check_layers(cfg: TrainConfig) -> None:
    attention_is_known(cfg)
    attention_accepts_its_options(cfg)
    feed_forward_is_known(cfg)
    layers_accept_their_options(cfg)


def _check_layout(cfg: TrainConfig, world: int) -> None:
    task_of(cfg.train.task)
    check_optim(cfg.optim)
    differ = cfg.model.layer_experts or cfg.model.expert_widths  # then the layers' rule asks of each
    check_layout(cfg.parallel, world, None if differ else cfg.model.num_experts)
