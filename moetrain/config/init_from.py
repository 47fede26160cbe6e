"""``init_from`` and ``source``: the model that is read decides ``model``, ``router`` and the tokenizer.

Its values stand between the defaults and the command line: what the user says still comes last, and must fit.
"""

from __future__ import annotations

import glob
import re
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from moetrain.config.hydra.store import CONFIG_DIR
from moetrain.convert.options import UpcycleConfig
from moetrain.flat import keys_of
from moetrain.train.changes import same_path
from moetrain.train.options import TrainConfig
from moetrain.train.run_files import CONFIG, TOKENIZER
from moetrain.verify.options import VerifyConfig

if TYPE_CHECKING:
    from moetrain.models.hf.family import ModelSpec

_DESCRIBED = ("init_from", "model", "router", "experts")  # what a model's description decides
# of a dense source nothing but that it has none, so that an experiment says it in upcycling
_OF_EXPERTS = {
    f"model.{key}"
    for key in (
        *("num_experts", "d_ff_expert", "layer_experts", "layer_widths", "expert_widths"),
        *("num_shared_experts", "d_ff_shared", "shared_gate", "moe_every", "first_dense"),
    )
}
_KEY: dict[type, str] = {TrainConfig: "init_from", VerifyConfig: "init_from", UpcycleConfig: "source"}


def source_overrides(
    root: type, overrides: list[str], config_name: str = "train", config_dir: str | None = None
) -> list[str]:
    """What the model that ``overrides`` name adds before them; nothing where there is none.

    A whole group chosen by the user (``model=``, ``router=``, ``experts=``) is left to him, and the
    tokenizer too where he names one. A run that goes on from its own checkpoint is described by its own
    folder: the one that it began with may have changed, or be gone. Raises UserError for a path that is
    neither kind of folder.
    """
    given = dict(o.lstrip("+").partition("=")[::2] for o in overrides)
    key = _KEY.get(root)
    value = given.get(key, "null").strip("'\"") if key is not None else "null"
    if value in ("null", ""):
        return []
    from moetrain.config.stored import read_spec  # late: composing most configs needs no torch

    own = _begun_run(root, overrides, value, config_name, config_dir) if key == "init_from" else None
    path = own or Path(value).expanduser()
    spec = read_spec(path, str(key))
    if own is None:  # layers that predict further tokens are taken by as many as the user says
        future = replace(spec.model.future, layers=0)
        spec = replace(spec, model=replace(spec.model, future=future))
    found = spec_overrides(spec)
    if root is UpcycleConfig and not spec.model.num_experts:
        said = _experiment_keys(given.get("experiment", ""), config_dir) & _OF_EXPERTS
        found.append(f"model.d_ff_expert={spec.model.d_ff}")  # what whole networks as experts need
        found = [line for line in found if line.partition("=")[0] not in {*said, "experts.kind"}]
    if not any(key.startswith("data.tokenizer") for key in given):
        tokenizer = path / TOKENIZER if (path / CONFIG).is_file() else path
        found += ["data.tokenizer.kind=file", f"data.tokenizer.path={_spelled(str(tokenizer.absolute()))}"]
    groups = [group for group in ("model", "router", "experts") if group in given]
    chosen = tuple(f"{group}{mark}" for group in groups for mark in ".=")
    return [override for override in found if not override.startswith(chosen)]


def _experiment_keys(name: str, config_dir: str | None) -> set[str]:
    """The dotted keys of ``model`` that the experiment ``name`` sets itself; none where there is no such."""
    folders = [CONFIG_DIR, *([Path(config_dir)] if config_dir is not None else [])]
    files = [
        file for folder in folders if name and (file := folder / "experiment" / f"{name}.yaml").is_file()
    ]
    parts = [OmegaConf.select(OmegaConf.load(file), "model") for file in files]
    return {f"model.{key!s}" for part in parts if isinstance(part, DictConfig) for key in part}


def _begun_run(
    root: type, overrides: list[str], source: str, config_name: str, config_dir: str | None
) -> Path | None:
    """A run folder that ``overrides`` lead to, whose run began from ``source`` and has a checkpoint."""
    from moetrain.checkpoint.read import CHECKPOINTS, run_of, steps_in
    from moetrain.config.hydra.compose import check_composes, load_yaml
    from moetrain.config.hydra.overrides import is_sweep

    plain = [o for o in overrides if keys_of([o])[0].partition(".")[0] not in _DESCRIBED and not is_sweep(o)]
    node = check_composes(root, plain, config_name, config_dir)
    run, resume = node.run, str(node.resume)
    if resume == "none":
        return None
    if resume != "auto":
        folders = [Path(resume), run_of(Path(resume))]
    elif run.dir is None and run.name is None:
        return None
    else:
        folder = Path(run.dir) if run.dir is not None else Path(run.root) / str(run.name)
        folders = [folder, *_runs_of(folder, below=run.dir is not None)]
    for folder in folders:
        begun = (folder / CONFIG).is_file() and steps_in(folder / CHECKPOINTS)
        if begun and same_path(load_yaml(folder / CONFIG).init_from, source):
            return folder
    return None


def _runs_of(folder: Path, below: bool) -> list[Path]:
    """The runs of a sweep and of a comparison that were begun under the name ``folder``."""
    jobs = folder.glob("job*") if below else folder.parent.glob(f"{glob.escape(folder.name)}_job*")
    return sorted([*jobs, *folder.glob("*/seed_*")])


def spec_overrides(spec: ModelSpec) -> list[str]:
    """Hydra overrides under which a config describes just ``spec``."""
    no_products = () if spec.model.lora.rank is not None else ("lora",)  # then whoever trains says
    router = [f"router={spec.router.name}", *_values("router", spec.router, without=("name",))]
    return [
        *_values("model", spec.model, without=("attention_backend", *no_products)),
        *(router if spec.model.num_experts else []),
        f"experts.kind={spec.experts.kind.name}",
        f"experts.activation={spec.experts.activation.name}",
        f"experts.bias={str(spec.experts.bias).lower()}",
    ]


def _values(path: str, value: Any, without: tuple[str, ...] = ()) -> list[str]:
    if is_dataclass(value):
        parts = [(f.name, getattr(value, f.name)) for f in fields(value) if f.name not in without]
        return [line for name, part in parts for line in _values(f"{path}.{name}", part)]
    return [f"{path}={_spelled(value)}"]


def _spelled(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_spelled(item) for item in value)}]"
    if isinstance(value, str):
        return "'" + re.sub(r"(\\*)('|\$\{|\Z)", _escaped, value) + "'"
    return repr(value) if isinstance(value, float) else str(value)


def _escaped(found: re.Match[str]) -> str:
    """Backslashes count only before a quote, an interpolation or the end; the two are taken as text."""
    mark = found[2]
    return found[1] * 2 + (f"\\{mark}" if mark else "")
