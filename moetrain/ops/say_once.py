"""Warnings that many layers would give, said once a process."""

from __future__ import annotations

import warnings

_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn with ``message``, whatever the number of layers that have it to say."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)
