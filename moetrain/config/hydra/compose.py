"""Overrides -> frozen config, and YAML -> frozen config.

``compose_train`` is what ``moetrain train`` does with its command line; ``load_yaml`` reads
``runs/<name>/config.yaml``. Every refusal is a UserError of one line; nothing is written anywhere.
"""

from __future__ import annotations

import dataclasses
import io
import re
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError  # type: ignore[import-untyped]

from moetrain.config.editable import editable, freeze
from moetrain.config.explain import COMPOSE_ERRORS, explain, unknown_key
from moetrain.config.hydra.overrides import normalize, plugins_in, refuse_empty
from moetrain.config.hydra.store import CONFIG_DIR, class_of, register, tags_of, user_folder
from moetrain.config.init_from import source_overrides
from moetrain.config.rules.secrets import holds_no_secret
from moetrain.errors import UserError, shortened
from moetrain.files import MB, bounded_yaml, read_bytes
from moetrain.plugins import import_plugins
from moetrain.train.options import CompareConfig, TrainConfig

T = TypeVar("T")

HYDRA_VERSION_BASE = "1.3"
_DOLLAR = re.compile(r"(\\*)\$\{")


def compose_train(
    overrides: list[str], config_name: str = "train", config_dir: str | None = None
) -> TrainConfig:
    """The config that ``moetrain train <overrides>`` runs, types checked, rules (``validate``) not yet.

    ``config_dir`` is searched after the shipped configs, for ``config_name`` as for any group's option.
    """
    return compose_app(TrainConfig, config_name, overrides, config_dir)


def compose_app(root: type[T], config_name: str, overrides: list[str], config_dir: str | None = None) -> T:
    """The config of any command, whose class is ``root``."""
    import_plugins(plugins_in(overrides))  # may register the family of init_from
    source = source_overrides(root, overrides, config_name, config_dir)
    cfg = _compose(root, config_name, [*source, *overrides], config_dir)
    assert isinstance(cfg, root)
    refuse_empty(cfg)
    return cfg


def compose_arms(
    cfg: TrainConfig, overrides: list[str], config_name: str = "train", config_dir: str | None = None
) -> dict[str, TrainConfig]:
    """The config of each arm of ``cfg.compare``: the user's own ``overrides``, then the arm's."""
    arms = {}
    for name, extra in cfg.compare.arms.items():
        try:
            arm = compose_train([*overrides, *extra], config_name, config_dir)
        except UserError as e:
            raise UserError(f"compare.arms.{name}: {e}") from e
        arms[name] = dataclasses.replace(arm, compare=CompareConfig())
    return arms


def load_yaml(path: str | Path) -> TrainConfig:
    """Read a ``config.yaml``. UserError where the file is no YAML, or does not fit the schema.

    Never imports anything: a router from a plugin must have been imported before. Never resolves anything
    either: ``to_yaml`` writes values, and an interpolation could read the environment of whoever opens it.
    """
    where = str(path)
    node = _plain_node(read_bytes(Path(path), MB), where)
    if not isinstance(node, DictConfig):
        raise UserError(f"{where}: not a config: it holds no keys")
    _refuse_interpolations(OmegaConf.to_container(node, resolve=False), where)
    try:
        cfg = _finish(TrainConfig, _fit(TrainConfig, node, where), f"{where}: ")
    except COMPOSE_ERRORS as e:
        raise explain(e, [], lambda _: OmegaConf.create(), where=where) from e
    assert isinstance(cfg, TrainConfig)
    return cfg


def _plain_node(data: bytes, where: str) -> object:
    """What OmegaConf makes of YAML, which reads some plain words otherwise than PyYAML does."""
    try:
        return OmegaConf.load(io.StringIO(bounded_yaml(data, where)))
    except UserError:
        raise
    except MarkedYAMLError as e:
        line = f"line {e.problem_mark.line + 1} is " if e.problem_mark is not None else ""
        raise UserError(f"{where}: {line}not YAML: {e.problem or e.context}") from e
    except Exception as e:  # of constructors, and of OmegaConf for keys and values that it does not know
        raise UserError(f"{where}: not YAML: {' '.join(str(e).split())[:200]}") from e


def _refuse_interpolations(value: object, where: str, key: str = "") -> None:
    """``\\${`` is text, as ``to_yaml`` writes it: an odd number of backslashes before the brace."""
    if isinstance(value, dict):
        for name, child in value.items():
            _refuse_interpolations(child, where, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, child in enumerate(value):
            _refuse_interpolations(child, where, f"{key}.{number}")
    elif isinstance(value, str) and any(len(m[1]) % 2 == 0 for m in _DOLLAR.finditer(value)):
        raise UserError(
            f"{where}: {key} is an interpolation ({shortened(value)}): a saved config holds values only"
        )


def compose_node(
    root: type, config_name: str, overrides: list[str], config_dir: str | None = None
) -> DictConfig:
    """Hydra's composition against the schema of ``root``: interpolations resolve, ``???`` may remain."""
    with (
        user_folder(config_dir),
        initialize_config_dir(str(CONFIG_DIR), job_name="moetrain", version_base=HYDRA_VERSION_BASE),
    ):
        node = compose(config_name, overrides)
    OmegaConf.to_container(node, resolve=True)
    if OmegaConf.get_type(node) is not editable(root):  # a primary config of the user's, without our schema
        node = _fit(root, node, f"{config_name}.yaml")
    return node


def prepare(
    root: type, overrides: list[str], config_dir: str | None = None, sweep: bool = False
) -> list[str]:
    """Import plugins and store the schemas; returns the overrides as Hydra is to read them."""
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"--config-dir {config_dir}: there is no such folder")
    import_plugins(plugins_in(overrides))
    register()
    return normalize(root, overrides, sweep)


def check_composes(
    root: type, overrides: list[str], config_name: str, config_dir: str | None = None
) -> DictConfig:
    """Compose without asking for missing values: what ``--cfg`` and ``--help`` print. UserError as ever."""
    ready = prepare(root, overrides, config_dir)
    folder = str(Path(config_dir).resolve()) if config_dir is not None else None
    build = partial(compose_node, root, config_name, config_dir=folder)
    try:
        return build(ready)
    except COMPOSE_ERRORS as e:
        raise explain(e, ready, build, typed=dict(zip(ready, overrides, strict=True))) from e


def from_node(root: type, node: DictConfig) -> Any:
    """The frozen config of a node that Hydra composed, also in another process of a sweep."""
    register()
    if OmegaConf.get_type(node) is not editable(root):
        node = _fit(root, node, "config")
    return _finish(root, node)


def _compose(root: type, config_name: str, overrides: list[str], config_dir: str | None) -> Any:
    cfg = _finish(root, check_composes(root, overrides, config_name, config_dir))
    loaded = set(plugins_in(overrides))
    named = getattr(cfg, "plugins", [])
    late = [p for p in named if p not in loaded]
    if late:
        raise UserError(
            f"plugins=[{late[0]}] stands in a config file; code is imported only when the command line "
            f"says so: add plugins=[{','.join(named)}]"
        )
    return cfg


def _fit(root: type, node: DictConfig, where: str) -> DictConfig:
    """Merge keys of unknown origin into the schema; the tags (``router.name`` ...) choose the classes."""
    target = OmegaConf.structured(editable(root))
    for group, tag in tags_of(root).items():
        options = node.get(group)
        if not isinstance(options, DictConfig):
            raise UserError(f"{where}: {group} is missing or is not a group of keys")
        try:
            target[group] = OmegaConf.structured(editable(class_of(group, options.get(tag))))
        except UserError as e:
            raise UserError(f"{where}: {e}") from e
    try:
        merged = OmegaConf.merge(target, node)
        OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, ValueError, TypeError) as e:
        raise explain(e, [], lambda _: target, where=where) from e
    assert isinstance(merged, DictConfig)
    return merged


def _finish(root: type, node: DictConfig, where: str = "") -> Any:
    missing = sorted(OmegaConf.missing_keys(node))
    if missing:
        raise UserError(f"{where}{missing[0]} has no value; give it one: {missing[0]}=...")
    try:
        obj = OmegaConf.to_object(node)
    except (OmegaConfBaseException, ValueError, TypeError, AttributeError) as e:  # an added __class__
        raise UserError(f"{where}a key that no config has: {' '.join(str(e).split())}") from e
    _refuse_extra_keys(obj, where)
    cfg = freeze(obj)
    holds_no_secret(cfg, where)
    for group, tag in tags_of(root).items():
        part = getattr(cfg, group)
        name = getattr(part, tag)
        if class_of(group, name) is not type(part):
            raise UserError(f"{where}{group}.{tag}={name}: only {group}={name} chooses another {group}")
    return cfg


def _refuse_extra_keys(obj: Any, where: str, prefix: str = "") -> None:
    """``+key=value`` may add a key that no dataclass has, ``key=${...}`` give a group another type."""
    if isinstance(obj, dict):
        children = obj
    elif dataclasses.is_dataclass(obj):
        children, known = vars(obj), [f.name for f in dataclasses.fields(obj)]
        for key in children.keys() - set(known):
            raise UserError(where + unknown_key(prefix + key, known))
        for key in _groups(obj.__class__):  # an interpolation may stand for a whole group
            if not dataclasses.is_dataclass(children[key]):
                kind = type(children[key]).__name__
                raise UserError(f"{where}{prefix}{key} is a group of keys, and was given {kind}")
    else:
        return
    for key, child in children.items():
        _refuse_extra_keys(child, where, f"{prefix}{key}.")


@cache
def _groups(cls: type) -> list[str]:
    return [key for key, hint in get_type_hints(cls).items() if dataclasses.is_dataclass(hint)]
