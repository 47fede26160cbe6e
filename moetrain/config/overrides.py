"""Overrides as typed on a command line: quoting free text for Hydra's grammar, and reading ``plugins``."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from moetrain.config.store import variants
from moetrain.errors import UserError


def quote_texts(root: type, overrides: list[str]) -> list[str]:
    """Quote the values of keys that hold text, so that paths and prompts are taken as they are.

    ``prompt=def f(x):`` or ``data.path=/x/[ab]*.txt`` are not in Hydra's grammar, and ``run.name=1e3``
    would arrive as ``1000.0``. Left alone: quoted values, ``null`` and interpolations (``${...}``).
    """
    return [_quote(o) if _is_text(root, _path_of(o)) else o for o in overrides]


def plugins_in(overrides: list[str]) -> list[str]:
    """The packages of the last ``plugins=[...]``; UserError where it is no list of names."""
    names: list[str] = []
    for override in overrides:
        if _path_of(override) != ["plugins"]:
            continue
        try:
            value = OverridesParser.create().parse_override(override).value()
        except HydraException as e:
            raise UserError(f"{override}: plugins is a list of packages, as in plugins=[my_routers]") from e
        names = value if isinstance(value, list) else [value]
        if not all(isinstance(n, str) and n for n in names):
            raise UserError(f"{override}: plugins is a list of packages, as in plugins=[my_routers]")
    return names


def _path_of(override: str) -> list[str]:
    return override.partition("=")[0].lstrip("+").split(".")


def _quote(override: str) -> str:
    key, eq, text = override.partition("=")
    if not eq or text == "null" or "${" in text or re.fullmatch(r"(?s)'.*'|\".*\"", text):
        return override
    try:
        if OverridesParser.create().parse_override(override).value() == text:
            return override
    except (HydraException, ValueError):
        pass
    # In a quoted value only backslashes before a quote, or at the end, are escapes.
    escaped = re.sub(r"(\\*)'", lambda m: m.group(1) * 2 + r"\'", text)
    escaped = re.sub(r"(\\+)\Z", lambda m: m.group(1) * 2, escaped)
    return f"{key}='{escaped}'"


def _is_text(hint: Any, path: list[str]) -> bool:
    """Whether the key ``path`` below a config class holds a string in any of the classes it may have."""
    hints = get_args(hint) if get_origin(hint) is Union else (hint,)
    if not path:
        return str in hints
    for h in hints:
        if get_origin(h) is dict:
            return _is_text(get_args(h)[1], path[1:])
        if not dataclasses.is_dataclass(h):
            continue
        found = get_type_hints(h).get(path[0])
        options = variants().get(path[0], {}).values() if len(path) > 1 else ()
        if any(_is_text(o, path[1:]) for o in (found, *options) if o is not None):
            return True
    return False
