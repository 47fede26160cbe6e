"""Reading a ``config.json`` strictly: a key that is missing or means another model is an error by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetrain.errors import UserError


class Fields:
    """The keys of one ``config.json``; ``where`` names it in messages."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def refuse(self, text: str) -> UserError:
        return UserError(f"{self.where}: {text}")

    def integer(self, key: str) -> int:
        value = self.get(key)
        if type(value) is not int:
            raise self.refuse(f"{key} is {value!r}, not a whole number")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refuse(f"{key} is {value!r}, not a number")
        return float(value)

    def integer_or_none(self, key: str) -> int | None:
        return None if self.values.get(key) is None else self.integer(key)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(f"{key} is {value!r}, not true or false")
        return value

    def get(self, key: str) -> Any:
        if key not in self.values:
            raise self.refuse(f"{key} is missing")
        return self.values[key]

    def must_be(self, key: str, value: Any) -> None:
        """``key`` is absent or has the one ``value`` that this project's model stands for."""
        if self.values.get(key, value) != value:
            raise self.refuse(f"{key}={self.values[key]!r} is not supported: only {value!r} is")
