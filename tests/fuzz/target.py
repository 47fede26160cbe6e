"""What a target is: a file that users get from somewhere, and the commands and functions that read it."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fuzz.forms import Form
from moetrain.errors import UserError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]")
_PREFIX = "moetrain: error: "
_LONGEST = 4000  # characters of a line that somebody is to read


class FaultError(Exception):
    """A loader ended in a way that is a finding by itself; the message begins with the outcome."""


@dataclass(frozen=True)
class Way:
    """One way to read the mutated file: ``load`` runs in a copy of the world.

    ``judge(good, found)`` gets the result for the unmutated file too, and returns what is wrong, or None.
    """

    name: str
    load: Callable[[], Any]
    judge: Callable[[Any, Any], str | None]
    weight: int = 1


@dataclass(frozen=True)
class Target:
    """One of ``files`` (patterns) is mutated by ``form``; then ``sign(path, rng)`` may mend hashes.

    ``parts``: what of the world the ways need. ``share``: of all mutations of a long run.
    """

    name: str
    parts: tuple[str, ...]
    files: tuple[str, ...]
    form: Form
    ways: tuple[Way, ...]
    sign: Callable[[Path, Random], str | None] = lambda path, rng: None
    share: int = 1

    def mutate(self, rng: Random) -> tuple[Way, str]:
        """Change one file below the working directory; returns the way to read it, and the edit in words."""
        way = rng.choice([way for way in self.ways for _ in range(way.weight)])
        found = sorted(path for pattern in self.files for path in Path().glob(pattern))
        path = rng.choice(found)
        data, note = self.form(rng, path.read_bytes())
        path.write_bytes(data)
        signed = self.sign(path, rng)
        return way, f"{path}{signed or ''}: {note} -> {way.name}"


def same(good: Any, found: Any) -> str | None:
    """The judge of files whose every change can be told."""
    return None if found == good else "differs"


def anything(good: Any, found: Any) -> str | None:
    """The judge where nothing can tell one value from another, and any that is taken is right."""
    return None


def command(arguments: Sequence[str]) -> str:
    """What ``moetrain`` prints. Raises UserError with its error line, FaultError where it ends otherwise."""
    from moetrain.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    said = [line for line in err.getvalue().split("\n") if line.startswith(_PREFIX)]
    for name, text in (("stdout", out.getvalue()), ("stderr", err.getvalue())):
        if found := _CONTROL.search(text):
            raise FaultError(f"control: character {found[0]!r} on {name} of {arguments[0]}")
    if code == 0 and not said:
        return out.getvalue()
    if code not in (1, 2) or len(said) != 1:
        raise FaultError(f"exit: code {code} with {len(said)} error lines")
    if len(said[0]) > _LONGEST:
        raise FaultError(f"long: {len(said[0])} characters: {said[0][:100]}")
    raise UserError(said[0].removeprefix(_PREFIX))
