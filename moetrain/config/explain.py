"""Hydra's and OmegaConf's exceptions as one line each: key, value, what is allowed, the nearest name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import BooleanNode, DictConfig, EnumNode, FloatNode, IntegerNode, ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)
from yaml import MarkedYAMLError, YAMLError  # type: ignore[import-untyped]

from moetrain.config.hydra.store import CONFIG_DIR, variants
from moetrain.errors import UserError, shortened
from moetrain.nearest import near_miss, nearest

Compose = Callable[[list[str]], DictConfig]

# What composing can raise over a user's input: besides their own classes, Hydra and OmegaConf let plain
# ones through, such as an AttributeError for a key below null.
COMPOSE_ERRORS = (
    HydraException,
    OmegaConfBaseException,
    YAMLError,
    UnicodeDecodeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    OSError,  # a name of an option that is too long for a file's
    OverflowError,
    RecursionError,
)


def explain(
    error: Exception,
    overrides: list[str],
    compose: Compose,
    where: str = "",
    typed: dict[str, str] | None = None,
) -> UserError:
    """The one line for an exception that ``compose(overrides)`` raised.

    ``where`` names the file that is read, if there is one; ``typed`` maps an override to what the user wrote.
    """
    typed, compose = typed or {}, _remembered(compose)
    if isinstance(error, OverrideParseException):
        return UserError(
            _unreadable(typed.get(error.override, error.override), str(error.__cause__ or error))
        )
    culprit = _culprit_named_in(error, overrides) or find_culprit(overrides, compose)
    culprit = typed.get(culprit, culprit) if culprit else None
    if isinstance(error, MissingConfigException):
        return UserError(_missing_config(error, culprit))
    if isinstance(error, YAMLError):
        return UserError(_bad_yaml(error))
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if not isinstance(cause, OmegaConfBaseException):
        return UserError((f"{where}: " if where else "") + _other(error, culprit))
    file = _file_named_in(error)
    where = where or ": ".join(part for part in (culprit, file) if part) or "config"
    key = _full_key(cause, culprit)
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and isinstance(
        cause.parent_node, DictConfig
    ):
        siblings = [str(k) for k in cause.parent_node if k != "hydra"]
        said = "" if where == key else f"{where}: "
        return UserError(said + unknown_key(key, siblings, partial(_base_keys, compose)))
    return UserError(_bad_value(where, key, cause))


def find_culprit(overrides: list[str], compose: Compose) -> str | None:
    """The override without which composing works; else the last of the shortest failing prefix."""
    if not overrides or not _composes(compose, []):
        return None
    for i, override in enumerate(overrides):
        if _composes(compose, overrides[:i] + overrides[i + 1 :]):
            return override
    return next((o for i, o in enumerate(overrides) if not _composes(compose, overrides[: i + 1])), None)


def _culprit_named_in(error: Exception, overrides: list[str]) -> str | None:
    """Hydra often names the override, or its key, or the group's option: then nothing needs to be tried."""
    if isinstance(error, MissingConfigException):
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        wanted = [o for o in overrides if o == f"{group}={name}"]
    else:
        found = re.match(r"(?s)Error merging override (.*)|Could not override '([^']+)'", str(error))
        line, key = found.groups() if found else (None, None)
        wanted = [o for o in overrides if o == line or (key and key_of(o) == key)]
    return wanted[-1] if wanted else None


def key_of(override: str) -> str:
    """The dotted key that an override is about: ``+a.b=3`` -> ``a.b``."""
    return override.split("=", 1)[0].lstrip("+~").split("@", 1)[0]


def dotted_keys(node: Any, prefix: str = "") -> list[str]:
    """Every key below a plain dict, groups included, as it is typed on the command line."""
    if not isinstance(node, dict):
        return []
    return [
        k
        for name, child in node.items()
        for k in (f"{prefix}{name}", *dotted_keys(child, f"{prefix}{name}."))
    ]


def _remembered(compose: Compose) -> Compose:
    """Looking for the culprit asks for the same compositions again and again."""
    results: dict[tuple[str, ...], DictConfig | Exception] = {}

    def once(overrides: list[str]) -> DictConfig:
        key = tuple(overrides)
        if key not in results:
            try:
                results[key] = compose(overrides)
            except COMPOSE_ERRORS as e:
                results[key] = e
        result = results[key]
        if isinstance(result, Exception):
            raise result
        return result

    return once


def _composes(compose: Compose, overrides: list[str]) -> bool:
    try:
        compose(overrides)
    except COMPOSE_ERRORS:
        return False
    return True


def _base_keys(compose: Compose) -> list[str]:
    return dotted_keys(OmegaConf.to_container(compose([]))) if _composes(compose, []) else []


def _file_named_in(error: Exception) -> str:
    found = re.match(r"In '([^']+)'", str(error))
    return f"{found.group(1)}.yaml" if found else ""


def _full_key(cause: OmegaConfBaseException, culprit: str | None) -> str:
    """A key inside a list or dict given on the command line is reported relative to it: put it in place."""
    key = str(cause.full_key or cause.key or "")
    stem = key_of(culprit) if culprit else ""
    if not key:
        return stem
    inside = (
        stem
        and key != stem
        and not key.startswith((f"{stem}.", f"{stem}["))
        and not stem.startswith(f"{key}.")
    )
    return f"{stem}: {key}" if inside else key


def _unreadable(override: str, reason: str) -> str:
    if "=" not in override:
        return f"cannot read {override!r}: an override is key=value, as in model=tiny or train.steps=100"
    reason = reason.splitlines()[0]
    key, value = override.split("=", 1)
    simple = re.fullmatch(r"[\w.+~/@]+", key) and not re.search("['\"]", value)
    hint = f"; quote a value with special characters: '{key}=\"{value}\"'" if simple else ""
    return f"cannot read {override!r} ({reason}){hint}"


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
    if culprit and not key_of(culprit):
        return _unreadable(culprit, "there is no key")
    if culprit and "group override must be" in message:
        return f"{said}{key_of(culprit)} is a group; give the name of one of its options"
    if culprit and ("Ambiguous value" in message or "requires --multirun" in message):
        return f"{said}several values need -m (a sweep); for one list write {key_of(culprit)}=[a,b]"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return f"{said}{' '.join(lines[:2]) or type(error).__name__}"


def unknown_key(key: str, siblings: list[str], all_keys: Callable[[], list[str]] = list) -> str:
    """``siblings``: the keys beside ``key``; ``all_keys`` gives every dotted key of the config."""
    last = key.replace(": ", ".").rpartition(".")[2]
    stem = key[: len(key) - len(last)]
    if not stem:
        siblings = siblings + sorted({p.name for p in CONFIG_DIR.iterdir() if p.is_dir()} - set(siblings))
    close, owners = near_miss(last, siblings), _options_with(stem.rstrip("."), last)
    if owners:
        *others, final = owners
        listed = f"{', '.join(others)} and {final} have" if others else f"{final} has"
        hint = f" ({listed} it)"
    elif close:
        hint = f" (did you mean {stem}{close}?)"
    else:
        known = all_keys()
        same = [k for k in known if k.rpartition(".")[2] == last]
        meant = same[0] if same else near_miss(key, known)
        hint = f" (did you mean {meant}?)" if meant else ""
    return f"unknown key {key}{hint}; {stem.rstrip('.: ') or 'the top level'} has: {', '.join(siblings)}"


def _options_with(group: str, key: str) -> list[str]:
    """The options of a group whose schema has ``key``: ``data.path`` -> ``data=hub``, ``data=local``."""
    classes = variants().get(group, {})
    return sorted(
        f"{group}={n}" for n, c in classes.items() if key in {f.name for f in dataclasses.fields(c)}
    )


def _bad_value(where: str, key: str, cause: OmegaConfBaseException) -> str:
    first = shortened((cause.msg or str(cause)).splitlines()[0], 200)
    expected, child = "", cause.child_node
    if isinstance(cause, InterpolationResolutionError):
        pass
    elif where.startswith("~"):
        expected = f"{key} cannot be deleted, only set"
    elif "is not Optional" in first:
        expected = f"{key} cannot be null"
    elif isinstance(child, EnumNode):
        names = list(child.enum_type.__members__)
        close = near_miss(str(cause.value), names)
        hint = f" (did you mean {close}?)" if close else ""
        expected = f"{key} is one of {', '.join(names)}, not {shortened(str(cause.value))}{hint}"
    elif isinstance(child, (IntegerNode, FloatNode, BooleanNode)):
        kind = {IntegerNode: "a whole number", FloatNode: "a number", BooleanNode: "true or false"}[
            type(child)
        ]
        expected = f"{key} is {kind}, not {shortened(repr(cause.value))}"
    elif isinstance(child, DictConfig) and "not a subclass" in first:
        expected = f"{key} is a group of keys{nearest('', map(str, child or []))}"
    elif isinstance(child, ListConfig):
        expected = f"{key} is a list: {first}"
    return f"{where}: {expected or f'{key}: {first}'}"
