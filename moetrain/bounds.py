"""The ranges of settings, which stand in the metadata of dataclass fields, and the one check of them all.

``width: int = field(default=8, metadata=at_least(1))``. A range holds for every number in a field's value;
null passes. A subclass that gives a field another default keeps its range. Besides, every number is finite,
and a whole one fits 64 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass

from moetrain.errors import UserError

_INT64 = 2**63 - 1
_KEY = "range"


@dataclass(frozen=True)
class Range:
    """The numbers between two ends, of which an open one is left out; None: no end.

    ``together``: messages name both ends, not only the one that is broken. ``why`` is added to a message.
    """

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    together: bool = False
    why: str = ""

    def refusal(self, value: float) -> str | None:
        """What ``value`` has to do, as in "be 1 or more"; None where it lies in the range."""
        low = self.low is None or (self.low < value if self.open_low else self.low <= value)
        high = self.high is None or (value < self.high if self.open_high else value <= self.high)
        if low and high:
            return None
        said = self._interval() if self.together else self._most() if low else self._least()
        return f"{said}: {self.why}" if self.why else said

    def _interval(self) -> str:
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"lie in {left}{_plain(self.low)}, {_plain(self.high)}{right}"

    def _least(self) -> str:
        return f"be above {_plain(self.low)}" if self.open_low else f"be {_plain(self.low)} or more"

    def _most(self) -> str:
        return f"be below {_plain(self.high)}" if self.open_high else f"be {_plain(self.high)} or less"


Metadata = Mapping[str, Range]  # of a dataclass field
_ANY_FLOAT, _ANY_INT = Range(), Range(-_INT64, _INT64)


def at_least(low: float, most: float | None = None, why: str = "") -> Metadata:
    """From ``low`` on, up to ``most`` where it is given."""
    return {_KEY: Range(low, most, why=why)}


def above(low: float, why: str = "") -> Metadata:
    """Greater than ``low``."""
    return {_KEY: Range(low, open_low=True, why=why)}


def within(low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> Metadata:
    """Between ``low`` and ``high``; an open end is left out."""
    return {_KEY: Range(low, high, open_low, open_high, together=True)}


def range_of(cls: type, name: str) -> Range | None:
    """The range of a dataclass's field: that of the nearest class, itself included, that gives one."""
    for base in cls.__mro__:
        field = vars(base).get("__dataclass_fields__", {}).get(name)
        if field is not None and _KEY in field.metadata:
            found: Range = field.metadata[_KEY]
            return found
    return None


def check_ranges(settings: object, key: str = "") -> None:
    """Raise UserError for the first number of ``settings``, a dataclass, that is out of its range.

    ``key`` is the dotted key of ``settings`` itself; "" at the root.
    """
    if (line := range_refusal(settings, key)) is not None:
        raise UserError(line)


def range_refusal(settings: object, key: str = "") -> str | None:
    """The line that :func:`check_ranges` raises: key, value and range; None where there is none to raise."""
    for name, value, bounds in _numbers(settings, key, None):
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name}={value} must be a finite number"
        for each in (bounds, _ANY_FLOAT if isinstance(value, float) else _ANY_INT):
            if each is not None and (must := each.refusal(value)) is not None:
                return f"{name}={_shown(value)} must {must}"
    return None


def _numbers(
    value: object, key: str, bounds: Range | None
) -> Iterator[tuple[str, int | float, Range | None]]:
    """(dotted key, number, range). An element of a list that has a range goes by the key of the list."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value, bounds
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _numbers(part, f"{key}.{i}" if bounds is None else key, bounds)
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _numbers(part, f"{key}.{name}", bounds)
    elif is_dataclass(value):
        for field in fields(value):
            name = f"{key}.{field.name}" if key else field.name
            yield from _numbers(getattr(value, field.name), name, range_of(type(value), field.name))


def _plain(end: float | None) -> str:
    return f"{end:g}" if isinstance(end, float) else str(end)


def _shown(value: int | float) -> str:
    """At most 40 digits, counted without printing: Python refuses to print a very long number."""
    digits = 0 if isinstance(value, float) else int(abs(value).bit_length() * math.log10(2))
    return str(value) if digits < 40 else f"a number of {digits + 1} digits or so"
