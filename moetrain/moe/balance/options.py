"""Options of losses and controllers: from a config's values to the dataclass of the loss or controller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from moetrain.bounds import range_refusal
from moetrain.errors import shortened
from moetrain.nearest import nearest

Opts = TypeVar("Opts")

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class NoOptions:
    """The options of a loss without options."""


def read_options(cls: type[Opts], given: Mapping[str, object]) -> Opts:
    """An instance of the dataclass ``cls``, whose fields may have ranges (``bounds.py``).

    Enums are given by name; a whole number may stand for a number. Raises ValueError, in one line that begins
    with the option, for an option that is not known, of another type, or out of its range. A class may refuse
    more in its ``__post_init__``.
    """
    hints = get_type_hints(cls)
    for key in given:
        if key not in hints:
            raise ValueError(f"{key} is not an option{nearest(key, hints)}")
    options = cls(**{key: _typed(key, hints[key], value) for key, value in given.items()})
    if line := range_refusal(options):
        raise ValueError(line)
    return options


def _typed(key: str, hint: Any, value: object) -> object:
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in kinds:
        return None
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum):
            if isinstance(value, str) and value in kind.__members__:
                return kind[value]
        elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        elif (kind not in _KINDS and kind is not NoneType) or type(
            value
        ) is kind:  # what is not plain the options check themselves
            return value
    if value is None:
        raise ValueError(f"{key} cannot be null")
    names = [name for kind in kinds for name in _names(kind)]
    raise ValueError(f"{key} is {' or '.join(names)}, not {shortened(repr(value))}")


def _names(kind: Any) -> list[str]:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return list(kind.__members__)
    return ["null" if kind is NoneType else _KINDS[kind]]
