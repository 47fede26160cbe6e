"""The configuration that DeepSpeed gets: what moetrain decides, and what a user's own JSON adds to it.

Defaults of DeepSpeed's that have changed from version to version, or that change what a step does, have
explicit values here: clipping, the operation of gradient sums, overflow checks, sizes of buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import JsonValue

from moetrain.errors import UserError
from moetrain.files import read_json
from moetrain.train.deepspeed.options import DeepSpeedConfig

_LIMIT = 1 << 20  # bytes of a user's JSON
_BUCKET = 50_000_000  # elements of a buffer of gradients that are summed at once
_AUTO = "auto"  # as in configurations for transformers: whoever calls DeepSpeed decides

Json = dict[str, JsonValue]

_STAGES_1_AND_2: Json = {
    "allgather_bucket_size": _BUCKET,
    "round_robin_gradients": False,
    "parameter_alignment": False,
}
_STAGE_3: Json = {
    "stage3_prefetch_bucket_size": _BUCKET,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 0,  # what was gathered is freed after its use, as by FSDP
    "stage3_param_persistence_threshold": 0,  # nothing stays whole
    "sub_group_size": 1_000_000_000_000,  # a parameter group is updated at once
    "memory_efficient_linear": False,  # it would replace torch's linear in the whole process
}

# What a user may add or change: how fast it is, and what DeepSpeed itself writes down.
_PASSED = frozenset(
    {
        "zero_optimization.allgather_bucket_size",
        "zero_optimization.offload_optimizer.buffer_count",
        "zero_optimization.offload_optimizer.pin_memory",
        "zero_optimization.overlap_comm",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.stage3_max_live_parameters",
        "zero_optimization.stage3_max_reuse_distance",
        "zero_optimization.stage3_param_persistence_threshold",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.use_multi_rank_bucket_allreduce",
        *("aio", "comms_logger", "disable_python_gc", "dump_state", "flops_profiler", "log_level"),
        *("memory_breakdown", "timers", "wall_clock_breakdown"),
    }
)

# The key of moetrain that decides what a key of DeepSpeed's would.
_DECIDED = {
    "activation_checkpointing": "train.recompute",
    "amp": "train.precision",
    "bf16": "train.precision",
    "checkpoint": "checkpoint.*",
    "compile": "train.compile",
    "csv_monitor": "tracker",
    "curriculum_learning": "data.*",
    "data_efficiency": "data.*",
    "data_types": "train.precision",
    "communication_data_type": "train.precision",
    "expert_parallel": "parallel.ep",
    "fp16": "train.precision",
    "gradient_accumulation_steps": "train.global_batch_tokens and train.micro_batch_size",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim",
    "scheduler": "schedule",
    "steps_per_print": "tracker",
    "tensorboard": "tracker",
    "torch_autocast": "train.precision",
    "train_batch_size": "train.global_batch_tokens",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "wandb": "tracker",
    "zero_optimization.cpu_offload": "engine.offload",
    "zero_optimization.offload_optimizer": "engine.offload",
    "zero_optimization.stage": "engine.zero_stage",
}


def own_config(cfg: DeepSpeedConfig) -> Json:
    """What moetrain decides. DeepSpeed counts one sample a micro-batch: it never sees how many there are."""
    zero: Json = {"stage": cfg.zero_stage}
    if cfg.zero_stage:
        zero |= {
            "reduce_scatter": True,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": _BUCKET,
        }
        zero |= _STAGE_3 if cfg.zero_stage == 3 else _STAGES_1_AND_2
    if cfg.zero_stage in (1, 2):
        # moetrain takes the norm before an update is decided on; with offload it cannot be left out
        zero["compute_grad_norm"] = cfg.offload
    if cfg.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "mean" if cfg.zero_stage == 3 else "sum",  # it has no other at stage 3
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "steps_per_print": None,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def merged_config(cfg: DeepSpeedConfig) -> Json:
    """:func:`own_config` with the user's JSON, ``engine.config``, merged into it.

    Raises UserError where the file cannot be read, and with the names of all keys that moetrain decides
    otherwise or does not pass on. A value ``auto`` leaves a key to moetrain.
    """
    config = own_config(cfg)
    if cfg.config is None:
        return config
    path = Path(cfg.config).expanduser()
    complaints = []
    for key, value in _leaves(read_json(path, dict[str, JsonValue], _LIMIT)):
        if _is_passed(key):
            _set(config, key, value)
        elif value != _AUTO and not _says(config, key, value):
            complaints.append(f"{key} ({_reason(key)})")
    if complaints:
        raise UserError(f"engine.config={cfg.config}: take out {', '.join(complaints)}")
    return config


def _leaves(section: Mapping[str, JsonValue], prefix: str = "") -> Iterator[tuple[str, JsonValue]]:
    for name, value in section.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _prefixes(key: str) -> Iterator[str]:
    """The key and the sections that it lies in, the innermost first."""
    parts = key.split(".")
    return (".".join(parts[:count]) for count in range(len(parts), 0, -1))


def _is_passed(key: str) -> bool:
    return any(prefix in _PASSED for prefix in _prefixes(key))


def _reason(key: str) -> str:
    decided = next((_DECIDED[prefix] for prefix in _prefixes(key) if prefix in _DECIDED), None)
    return "moetrain does not pass it on" if decided is None else f"{decided} decides that"


def _says(config: Json, key: str, value: JsonValue) -> bool:
    """Whether ``config`` has the same value already; what is switched off is as good as left out."""
    found: JsonValue = config
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return value in (False, None) or value == {}
        found = found[part]
    return found == value and isinstance(found, bool) == isinstance(value, bool)


def _set(config: Json, key: str, value: JsonValue) -> None:
    *sections, name = key.split(".")
    for part in sections:
        inner = config.setdefault(part, {})
        assert isinstance(inner, dict)
        config = inner
    config[name] = value
