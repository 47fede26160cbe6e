"""Reading a ``config.json`` strictly: a key that is missing or means another model is an error by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from moetrain.errors import UserError, quoted

MAX_LAYERS = 4096  # where no stored tensors say how many there are
_MAX_INT = 2**31 - 1  # no dimension of a model comes near it, and products of two fit 64 bits
_WORD = re.compile(r"[A-Za-z0-9_./-]*")  # what a value may consist of that goes on into a config of ours
_ABSENT: Mapping[str, Any] = {}


class Fields:
    """The keys of one ``config.json``; ``where`` names it in messages.

    ``defaults``: what an absent key means. ``layers``: how many layers the files hold, at most. A key counts
    as used once it has been asked for by any of the methods; :meth:`unused` are the others.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        defaults: Mapping[str, Any] = _ABSENT,
        layers: int = MAX_LAYERS,
    ) -> None:
        self.values, self.where = values, where
        self._defaults, self._layers = defaults, layers
        self._used: set[str] = set()

    def refuse(self, text: str) -> UserError:
        return UserError(f"{self.where}: {text}")

    def get(self, key: str) -> Any:
        """The value as it stands there. Raises UserError where it is absent and has no default."""
        self._used.add(key)
        if key in self.values:
            return self.values[key]
        if key in self._defaults:
            return self._defaults[key]
        raise self.refuse(f"{key} is missing")

    def has(self, key: str) -> bool:
        """Whether the file itself has the key."""
        return key in self.values

    def integer(self, key: str) -> int:
        value = self.get(key)
        if type(value) is not int:
            raise self.refuse(f"{key} is {quoted(value)}, not a whole number")
        if abs(value) > _MAX_INT:
            raise self.refuse(f"{key} is {quoted(value)}: at most {_MAX_INT} is possible")
        return value

    def layers(self, key: str = "num_hidden_layers") -> int:
        """The number of layers, which the files hold."""
        count = self.get(key)
        if type(count) is int and count > self._layers:
            raise self.refuse(f"{key}={quoted(count)}, but the files hold {self._layers} layer(s)")
        return self.integer(key)

    def number(self, key: str) -> float:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refuse(f"{key} is {quoted(value)}, not a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.refuse(f"{key} is {quoted(value)}, not a finite number")
        return number

    def integer_or_none(self, key: str) -> int | None:
        absent = key not in self.values and key not in self._defaults
        return None if absent or self.get(key) is None else self.integer(key)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """``default``: for an absent key that has none in the family's table."""
        absent = default is not None and key not in self.values and key not in self._defaults
        value = default if absent else self.get(key)
        if not isinstance(value, bool):
            raise self.refuse(f"{key} is {quoted(value)}, not true or false")
        return value

    def word(self, key: str) -> str:
        """A name: letters, digits, ``_``, ``.``, ``/`` and ``-``, since it may reach other parsers."""
        value = self.get(key)
        self.check_plain(key, value)
        if not isinstance(value, str):
            raise self.refuse(f"{key} is {quoted(value)}, not a name")
        return value

    def check_plain(self, key: str, value: object) -> None:
        """Raises UserError unless every string within ``value`` is such a name, and every number finite."""
        if isinstance(value, float) and not math.isfinite(value):
            raise self.refuse(f"{key} is {value}, not a finite number")
        if isinstance(value, str) and not _WORD.fullmatch(value):
            raise self.refuse(f"{key}: {quoted(value)} is no plain name (letters, digits, _, ., / and -)")
        if isinstance(value, (list, tuple)):
            for item in value:
                self.check_plain(key, item)
        if isinstance(value, dict):
            for name, item in value.items():
                self.check_plain(key, name)
                self.check_plain(f"{key}.{name}", item)

    def must_be(self, key: str, *values: Any) -> None:
        """``key`` is absent or has one of the ``values`` that this project's model stands for."""
        self._used.add(key)
        if key in self.values and not any(_same(self.values[key], value) for value in values):
            raise self.refuse(f"{key}={quoted(self.values[key])} is not supported: only {values[0]!r} is")

    def without_effect(self, *keys: str) -> None:
        """These keys say nothing about the model's function, whatever their values are."""
        self._used.update(keys)

    def unused(self) -> dict[str, Any]:
        """What nobody has asked for."""
        return {key: value for key, value in self.values.items() if key not in self._used}


def _same(one: object, other: object) -> bool:
    """Equal, and true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)
