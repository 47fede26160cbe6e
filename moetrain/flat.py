"""A config as dotted keys, as the command line names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from enum import Enum
from typing import Any

from moetrain.errors import shortened

Leaf = str | int | float | bool | None | list[Any]

# The key of each polymorphic group that names the class of its other keys.
TAGS = {
    "router": "name",
    "data": "source",
    "optim": "name",
    "engine": "name",
    "tracker": "name",
    "method": "name",
}


def flat(value: Any, prefix: str = "") -> dict[str, Leaf]:
    """Dotted key -> value of every key below ``value``: a config, or what a YAML file of one holds.

    Enums become their names. Entries of a mapping and of a list of sections are keys of their own
    (``balance.losses.0.coef``); any other list is a value, and so is an empty mapping.
    """
    children = _children(value)
    if not children:
        return {prefix: _leaf(value)} if prefix else {}
    below: dict[str, Leaf] = {}
    for name, child in children.items():
        below |= flat(child, f"{prefix}.{name}" if prefix else str(name))
    return below


def prefixes(keys: Iterable[str]) -> set[str]:
    """The keys and every section that one of them lies in."""
    return {
        ".".join(parts[:n]) for key in keys for parts in [key.split(".")] for n in range(1, len(parts) + 1)
    }


def lies_in(key: str, sections: Iterable[str]) -> bool:
    """Whether ``key`` is one of ``sections``, or lies in one."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def keys_of(overrides: Collection[str]) -> list[str]:
    """The keys and sections that overrides speak of: ``router`` of ``router=switch``."""
    return [o.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".") for o in overrides]


def shown(value: Leaf) -> str:
    """A value as YAML and the command line spell it, at most 60 characters."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    text = f"[{','.join(shown(item) for item in value)}]" if isinstance(value, list) else str(value)
    return shortened(text)


def _children(value: Any) -> dict[str, Any] | None:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return value
    if isinstance(value, (list, tuple)) and any(_children(item) is not None for item in value):
        return {str(index): item for index, item in enumerate(value)}
    return None


def _leaf(value: Any) -> Leaf:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (list, tuple)):
        return [_leaf(item) for item in value]
    leaf: Leaf = value if value != {} else []
    return leaf
