"""A config as plain values, and as the YAML of ``config.yaml``."""

from __future__ import annotations

import dataclasses
import re
from enum import Enum
from typing import Any

import yaml  # type: ignore[import-untyped]

_DOLLAR = re.compile(r"(\\*)\$\{")
_BOOLEANS = frozenset(  # of YAML 1.1, which a reader may know
    form
    for word in ("y", "yes", "n", "no", "true", "false", "on", "off")
    for form in (word, word.capitalize(), word.upper())
)


def plain(value: Any) -> Any:
    """Lists, mappings and scalars, in the order of the fields; enums become their names."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value.name if isinstance(value, Enum) else value


def to_yaml(value: Any) -> str:
    """YAML with every key of a config, or of plain values of one.

    Text that a reader might take for a number, a truth value or an interpolation (``${``) is quoted or
    escaped, so that it is read as text.
    """
    return str(
        yaml.dump(
            _escaped(plain(value)),
            Dumper=_Dumper,
            default_flow_style=False,
            allow_unicode=True,
            sort_keys=False,
        )
    )


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes what other readers of YAML than PyYAML take for a number or a truth value."""


def _represent_text(dumper: _Dumper, text: str) -> Any:
    style = "'" if text in _BOOLEANS or _is_number(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _escaped(value: Any) -> Any:
    """Texts of plain values, with a backslash before each ``${`` and those before it doubled."""
    if isinstance(value, dict):
        return {name: _escaped(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_escaped(part) for part in value]
    if isinstance(value, str):
        return _DOLLAR.sub(lambda found: found[1] * 2 + r"\${", value)
    return value
