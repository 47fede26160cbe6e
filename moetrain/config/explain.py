"""Hydra's and OmegaConf's exceptions as one line each: key, value, what is allowed, the nearest name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import BooleanNode, DictConfig, EnumNode, FloatNode, IntegerNode, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from moetrain.errors import UserError

Compose = Callable[[list[str]], DictConfig]

# What composing can raise over a user's input. Hydra uses plain ValueError, TypeError and AssertionError too.
COMPOSE_ERRORS = (
    HydraException,
    OmegaConfBaseException,
    YAMLError,
    UnicodeDecodeError,
    ValueError,
    TypeError,
    AssertionError,
)


def near_miss(word: str, known: Iterable[str]) -> str | None:
    """The known name that ``word`` was probably meant to be, or None."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; known: a, b"``, with ``" (did you mean a?)"`` where one is near; schema names (``_x``) are left out."""
    names = sorted(k for k in known if not k.startswith("_"))
    close = near_miss(word, names)
    hint = f" (did you mean {close}?)" if close else ""
    return f"; known: {', '.join(names)}{hint}" if names else ""


def explain(error: Exception, overrides: list[str], compose: Compose, where: str = "") -> UserError:
    """The one line for an exception that ``compose(overrides)`` raised; ``where`` names a file, if one is read."""
    if isinstance(error, OverrideParseException):
        return UserError(_unreadable(error.override, str(error.__cause__ or error)))
    culprit = find_culprit(overrides, compose)
    if isinstance(error, MissingConfigException):
        return UserError(_missing_config(error, culprit))
    if isinstance(error, YAMLError):
        return UserError(_bad_yaml(error))
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if not isinstance(cause, OmegaConfBaseException):
        return UserError(_other(error, culprit))
    where = where or culprit or _file_named_in(error)
    key = _full_key(cause, culprit)
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and cause.parent_node is not None:
        return UserError(_unknown_key(where, key, cause.parent_node, _base_keys(compose)))
    return UserError(_bad_value(where, key, cause))


def find_culprit(overrides: list[str], compose: Compose) -> str | None:
    """The override without which composing works; else the last of the shortest failing prefix."""
    if not overrides or not _composes(compose, []):
        return None
    for i, override in enumerate(overrides):
        if _composes(compose, overrides[:i] + overrides[i + 1 :]):
            return override
    return next((o for i, o in enumerate(overrides) if not _composes(compose, overrides[: i + 1])), None)


def key_of(override: str) -> str:
    """The dotted key that an override is about: ``+a.b=3`` -> ``a.b``."""
    return override.split("=", 1)[0].lstrip("+~").split("@", 1)[0]


def dotted_keys(node: Any, prefix: str = "") -> list[str]:
    """Every key below a composed config, groups included, as it is typed on the command line."""
    if not isinstance(node, DictConfig) or OmegaConf.is_missing({"x": node}, "x") or node._is_none():
        return []
    keys = []
    for name in node:
        child = node._get_node(name)
        keys += [f"{prefix}{name}", *dotted_keys(child, f"{prefix}{name}.")]
    return keys


def _composes(compose: Compose, overrides: list[str]) -> bool:
    try:
        compose(overrides)
    except COMPOSE_ERRORS:
        return False
    return True


def _base_keys(compose: Compose) -> list[str]:
    try:
        return dotted_keys(compose([]))
    except COMPOSE_ERRORS:
        return []


def _file_named_in(error: Exception) -> str:
    found = re.match(r"In '([^']+)'", str(error))
    return f"{found.group(1)}.yaml" if found else "config"


def _full_key(cause: OmegaConfBaseException, culprit: str | None) -> str:
    """A key inside a list or dict given on the command line is reported relative to it: put it in place."""
    key = str(cause.full_key or cause.key or "")
    stem = key_of(culprit) if culprit else ""
    inside = stem and key != stem and not key.startswith(f"{stem}.") and not stem.startswith(f"{key}.")
    return f"{stem}: {key}" if inside else key


def _unreadable(override: str, reason: str) -> str:
    if "=" not in override:
        return f"cannot read {override!r}: an override is key=value, as in model=tiny or train.steps=100"
    reason = reason.splitlines()[0]
    key, value = override.split("=", 1)
    return f"cannot read {override!r} ({reason}); quote a value with special characters: '{key}=\"{value}\"'"


def _missing_config(error: MissingConfigException, culprit: str | None) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return f"--config-name {name}: there is no {name}.yaml in the config folders"
    said = f"{group}={name}"
    by = f" (from {culprit or _file_named_in(error)})" if culprit != said else ""
    return f"{said}{by}: no such option{nearest(name, error.options or [])}"


def _bad_yaml(error: YAMLError) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}: line {mark.line + 1} is not YAML: {error.problem or error.context}"
    return f"not YAML: {' '.join(str(error).split())}"


def _other(error: Exception, culprit: str | None) -> str:
    """Errors without a node: a group given a number, a key below null, a sweep without -m."""
    said = f"{culprit}: " if culprit else ""
    message = str(error)
    if culprit and "group override must be" in message:
        return f"{said}{key_of(culprit)} is a group; give the name of one of its options"
    if culprit and isinstance(error, AssertionError):
        parent = key_of(culprit).rpartition(".")[0]
        return f"{said}{parent} is null, so it has no keys; give the whole of it: '+{parent.split('.')[0]}={{...}}'"
    if culprit and ("Ambiguous value" in message or "requires --multirun" in message):
        return f"{said}several values need -m (a sweep); for one list write {key_of(culprit)}=[a,b]"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return f"{said}{' '.join(lines[:2]) or type(error).__name__}"


def _unknown_key(where: str, key: str, parent: Any, all_keys: list[str]) -> str:
    last = key.replace(": ", ".").rpartition(".")[2]
    siblings = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
    stem = key[: len(key) - len(last)]
    close = near_miss(last, siblings)
    if close:
        hint = f" (did you mean {stem}{close}?)"
    else:
        same = [k for k in all_keys if k.rpartition(".")[2] == last] or [near_miss(key, all_keys)]
        hint = f" (did you mean {same[0]}?)" if same[0] else ""
    said = f"{where}: " if where != key else ""
    owner = stem.rstrip(".: ") or "the top level"
    return f"{said}unknown key {key}{hint}; {owner} has: {', '.join(siblings)}"


def _bad_value(where: str, key: str, cause: OmegaConfBaseException) -> str:
    first = (cause.msg or str(cause)).splitlines()[0]
    expected, child = "", cause.child_node
    if "is not Optional" in first:
        expected = f"{key} cannot be null"
    elif isinstance(child, EnumNode):
        names = list(child.enum_type.__members__)
        close = near_miss(str(cause.value), names)
        hint = f" (did you mean {close}?)" if close else ""
        expected = f"{key} is one of {', '.join(names)}, not {cause.value}{hint}"
    elif isinstance(child, (IntegerNode, FloatNode, BooleanNode)):
        kind = {IntegerNode: "a whole number", FloatNode: "a number", BooleanNode: "true or false"}[type(child)]
        expected = f"{key} is {kind}, not {cause.value}"
    elif isinstance(child, DictConfig) and "not a subclass" in first:
        expected = f"{key} is a group of keys{nearest('', map(str, child or []))}"
    elif isinstance(child, ListConfig):
        expected = f"{key} is a list: {first}"
    return f"{where}: {expected or f'{key}: {first}'}"
