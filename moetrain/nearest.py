"""Near misses: what a mistyped name was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 100  # characters of a name; comparing takes the square of them


def near_miss(word: str, known: Iterable[str]) -> str | None:
    """The known name that ``word`` was probably meant to be, or None."""
    if len(word) > _LONGEST:
        return None
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; known: a, b"``, plus ``" (did you mean a?)"`` where one is near. Names like ``_a`` stay
    hidden."""
    names = sorted(k for k in known if not k.startswith("_"))
    close = near_miss(word, names)
    hint = f" (did you mean {close}?)" if close else ""
    return f"; known: {', '.join(names)}{hint}" if names else "; there are none"
