"""The exceptions that mean: the user can mend this. The command line prints them without a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

STOPPED = 75  # EX_TEMPFAIL: asked to stop before the last step, and saved; the same command goes on


class UserError(Exception):
    """One line: what was wrong, where (config key, file, rank), both numbers, and what to do."""

    exit_code = 2

    def __str__(self) -> str:  # a value or a library's own words may hold any separator of lines
        return " ".join(super().__str__().splitlines())


class TrainingError(UserError):
    """Training itself went wrong (a loss not finite, a spike), with the last good checkpoint named."""

    exit_code = 1


class ProofError(UserError):
    """What was promised to be equal is not."""

    exit_code = 1


def shortened(text: str, most: int = 60) -> str:
    """At most ``most`` characters of a text that a message quotes."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def quoted(value: object) -> str:
    """A value that was read, as a message quotes it: what Python prints, at most 80 characters."""
    try:
        return shortened(repr(value), 80)
    except ValueError:  # an int of more digits than Python prints
        return "a huge number"


_listeners: list[Callable[[str], None]] = []


@contextlib.contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """A context in which ``listener`` gets the line that this process ends with, from any thread."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def write_error_file(line: str) -> None:
    """Leave ``line`` where torchrun looks for it: it shows that of the first rank to fail."""
    for listener in list(_listeners):
        listener(line)
    if note := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(note).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))
