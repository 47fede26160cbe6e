"""JSON-lines files that grow by one row a step, and whose last line a crash may have cut.

Files are read line by line and never held whole. What is no row (see :func:`row_in`) is set aside when a run
goes on, passed over by readers that only look, and an error for those that need every row.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

from moetrain.errors import UserError
from moetrain.files import open_regular
from moetrain.writing import replacing

LONGEST = 64 << 20  # bytes of a line: the loads of 1,000 layers of 3,000 experts
_STEPS = 2**62

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """A line without its line end. ``row``: None if it holds none. ``ended``: whether it had a line end."""

    number: int
    start: int  # its first byte's place in the file
    text: bytes
    row: dict[str, Any] | None
    ended: bool


class JsonlFile:
    """A file of JSON rows, one a line. :meth:`append` returns after the row is passed to the system.

    ``write=False``: every method does nothing. The first append to an existing file completes a last line
    that a killed process left unfinished.
    """

    def __init__(self, path: Path, write: bool = True) -> None:
        self.path = path
        self._write = write
        self._file: BinaryIO | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row. A float that is not finite becomes null, since JSON cannot express it.

        Raises UserError when the disk is full or the file cannot be written; no part of the row stays then.
        """
        if not self._write:
            return
        line = (json.dumps(_finite(row), allow_nan=False) + "\n").encode()
        try:
            if self._file is None:
                _mend(self.path)
                self._file = self.path.open("ab", buffering=0)
            start = self._file.seek(0, os.SEEK_END)
            try:
                done = 0
                while done < len(line):
                    done += self._file.write(line[done:])
            except OSError:
                self._file.truncate(start)
                raise
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from error

    def truncate_after(self, step: int) -> int | None:
        """Keep only rows whose ``step`` is at most ``step``, or without one; returns the last step kept.

        Lines that hold no row are moved to ``<name>.rejected.jsonl`` with a warning; an unfinished last one
        is dropped. The file is cut or replaced whole; where the disk is full it stays as it was, and that is
        a UserError.
        """
        if not self._write or not self.path.exists():
            return None
        self.close()
        try:
            found = _survey(self.path, step)
            if found.rejected:
                _set_aside(self.path)
            if found.rejected or found.end < found.kept_end:
                _rewrite(self.path, step)
            elif found.end < self.path.stat().st_size:
                os.truncate(self.path, found.end)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from error
        if found.rejected:
            count = f"{found.rejected} damaged line{'s' if found.rejected > 1 else ''}"
            log.warning(
                "%s: %s (the first is line %d) moved to %s",
                *(self.path, count, found.first_rejected, _rejects(self.path).name),
            )
        return found.last_step

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file (or of ``metrics.jsonl`` in a run folder), in order, all in memory.

    An unfinished last line is left out. Raises UserError if there is no such file or another line is damaged.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path} cannot be read: No such file or directory")
    rows = []
    for line in read_lines(path):
        if line.row is not None:
            rows.append(line.row)
        elif line.ended:
            raise UserError(f"{path} line {line.number} is damaged (it holds no row): remove that line")
    return rows


def last_row(path: Path, key: str) -> dict[str, Any] | None:
    """The last row that has ``key``; None without any, or without the file. Damaged lines are passed over."""
    mark = json.dumps(key).encode()
    found = None
    for line in read_lines(path, mark) if path.exists() else ():
        if line.row is not None and key in line.row:
            found = line.row
    return found


def read_lines(path: Path, mark: bytes = b"") -> Iterator[Line]:
    """Each line that is not empty, one in memory at a time; with ``mark``, those that contain it.

    Of a line longer than LONGEST only the beginning is given, and it holds no row. Raises UserError where the
    file cannot be read.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            start = 0
            for number, (text, end) in enumerate(_raw_lines(file), start=1):
                ended = text.endswith(b"\n")
                if mark in text and (text := text.removesuffix(b"\n")):
                    yield Line(number, start, text, row_in(text), ended)
                start = end
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def row_in(text: bytes) -> dict[str, Any] | None:
    """The row that a line holds: an object whose ``step``, if it has one, is a whole number of steps."""
    try:
        row = from_json(text.strip(b"\0"))  # a power cut may leave NULs
    except ValueError:
        return None
    if len(text) > LONGEST or not isinstance(row, dict):
        return None
    step = row.get("step", 0)
    return row if type(step) is int and 0 <= step < _STEPS else None


def _raw_lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Lines with their ends, and where each ends; of an overlong one a part that is longer than LONGEST."""
    while text := file.readline(LONGEST + 2):
        rest = text
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(LONGEST)
        yield (text if text.endswith(b"\n") or not rest else text + b"\n"), file.tell()


@dataclass(frozen=True)
class _Survey:
    """What a file holds: ``end`` is where the rows to keep end that stand together at its beginning."""

    end: int
    kept_end: int  # where the last row to keep ends
    last_step: int | None
    rejected: int
    first_rejected: int


def _survey(path: Path, step: int) -> _Survey:
    end = kept_end = rejected = first = 0
    last = None
    together = True
    for line in read_lines(path):
        if line.row is None:
            if line.ended:
                rejected, first = rejected + 1, first or line.number
            continue
        if (at := line.row.get("step", 0)) > step:
            together = False
            continue
        together = together and line.text == line.text.strip(b"\0")
        last = max(last or 0, at)
        kept_end = line.start + len(line.text) + line.ended
        end = kept_end if together else end
    return _Survey(end, kept_end, last, rejected, first)


def _set_aside(path: Path) -> None:
    """Add the damaged lines to the rejects."""
    with _rejects(path).open("ab") as rejects:
        for line in read_lines(path):
            if line.row is None and line.ended:
                rejects.write(line.text + b"\n")
        rejects.flush()
        os.fsync(rejects.fileno())


def _rewrite(path: Path, step: int) -> None:
    """Write the rows to keep anew, in another file that then takes the name."""
    with replacing(path) as temporary, temporary.open("wb") as kept:
        for line in read_lines(path):
            if line.row is not None and line.row.get("step", 0) <= step:
                kept.write(line.text.strip(b"\0") + b"\n")


def _rejects(path: Path) -> Path:
    return path.with_name(f"{path.stem}.rejected.jsonl")


def _mend(path: Path) -> None:
    """End an unfinished last line, or cut it off when it is not a whole row."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = _last_line(file, size)
        file.seek(start)
        if start == size:
            return
        if size - start <= LONGEST and row_in(file.read()) is not None:
            file.write(b"\n")
        else:
            file.truncate(start)


def _last_line(file: BinaryIO, size: int) -> int:
    """Where the last line of a file of ``size`` bytes begins; ``size`` where it has an end."""
    end = size
    while end > 0:
        begin = max(0, end - (1 << 16))
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return _finite(value.item()) if hasattr(value, "item") else value
