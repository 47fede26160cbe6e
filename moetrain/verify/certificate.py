"""What a proof leaves behind: a JSON file that training finds again by the config and the layout it is of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import JsonValue

import moetrain
from moetrain.checkpoint.options import CheckpointConfig
from moetrain.data.options import StdlibData
from moetrain.errors import UserError
from moetrain.files import MB, read_json
from moetrain.parallel.options import ParallelConfig
from moetrain.plain import plain, to_yaml
from moetrain.train.optim.options import ScheduleConfig
from moetrain.train.options import LoopConfig, TrainConfig
from moetrain.train.run_dir import environment, git_state
from moetrain.verify.compare import Check
from moetrain.verify.options import VerifyOptions
from moetrain.verify.twin import Twin, dp_shard, twin_of
from moetrain.writing import write_atomic

_FOLDER = "certificates"
_NOT_TRAINED = ("run", "resume", "resume_changes", "compare", "tracker", "verify")


@dataclass(frozen=True)
class _Environment:
    time: str
    moetrain: str
    git: dict[str, JsonValue] | None


@dataclass(frozen=True)
class _Certificate:
    """Of what :func:`write_certificate` writes, that which is read again."""

    environment: _Environment


def certificate_path(cfg: TrainConfig, world: int) -> Path:
    """Where the certificate of ``cfg`` on ``world`` ranks lies, if there is one: below ``run.root``."""
    return Path(cfg.run.root) / _FOLDER / f"{proof_hash(cfg, world)}.json"


def proof_hash(cfg: TrainConfig, world: int) -> str:
    """16 hex digits of what a proof is of: the twin, without what changes nothing of the comparison."""
    twin = twin_of(cfg, world, VerifyOptions().ranks).cfg
    kept = replace(
        twin,
        data=StdlibData(),
        schedule=ScheduleConfig(),
        optim=replace(twin.optim, lr=1.0),
        parallel=replace(twin.parallel, timeout=ParallelConfig().timeout, elastic=False),
        checkpoint=CheckpointConfig(),
        train=LoopConfig(recompute=twin.train.recompute, deterministic=twin.train.deterministic),
        plugins=[],
    )
    return config_hash(kept)


def config_hash(cfg: TrainConfig) -> str:
    """16 hex digits of what is trained: ``run``, ``resume*``, ``compare``, ``tracker`` do not take part."""
    kept = {key: value for key, value in plain(cfg).items() if key not in _NOT_TRAINED}
    return hashlib.sha256(to_yaml(kept).encode()).hexdigest()[:16]


def write_certificate(cfg: TrainConfig, world: int, twin: Twin, checks: Sequence[Check]) -> Path:
    """Raises UserError where it cannot be written."""
    path = certificate_path(cfg, world)
    content: dict[str, Any] = {
        "config_hash": proof_hash(cfg, world),
        "layout": _layout(cfg, world),
        "twin": {
            "layout": _layout(twin.cfg, twin.world),
            "model": twin.cfg.model,
            "router": twin.cfg.router.name,
        },
        "checks": [asdict(check) for check in checks],
        "environment": environment(cfg.train.seed, world, []),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made: {error.strerror}; set run.root=FOLDER") from error
    write_atomic(path, json.dumps(content, indent=1, default=_plain) + "\n")
    return path


def certificate_line(cfg: TrainConfig, world: int) -> str:
    """What training says of its layout: proved, proved by other code, or not."""
    path = certificate_path(cfg, world)
    none = f"this layout has no parity certificate; moetrain verify verify.world={world} ... makes one"
    if not path.exists():
        return none
    try:
        found = read_json(path, _Certificate, MB).environment
    except UserError as error:
        return f"{none} ({error})"
    now = git_state(Path(moetrain.__file__).parent)
    same = found.moetrain == moetrain.__version__ and found.git == now
    by = "" if same else ", by other code than this"
    return f"this layout was proved equal to one process: {path} ({found.time[:10]}{by})"


def _layout(cfg: TrainConfig, world: int) -> dict[str, int]:
    parallel = cfg.parallel
    shard = dp_shard(parallel, world)
    return {"world": world, "dp_replicate": parallel.dp_replicate, "dp_shard": shard, "ep": parallel.ep}


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else getattr(value, "name", str(value))
