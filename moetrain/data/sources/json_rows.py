"""The rows of a JSON file: an object a line or, where lines are no objects, one array or several objects."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from moetrain.data.sources.opening import opened
from moetrain.errors import UserError

MAX_LINE = 2**28  # bytes of one row; a small compressed file may hold a line that fills the memory
MAX_WHOLE = 2**29  # bytes of a file whose rows are not lines, which is held in memory

_SPACE = re.compile(r"[ \t\n\r]*")
_decoder = json.JSONDecoder()
_wide_decoder = json.JSONDecoder(parse_int=str)  # integers of more digits than Python converts stay text

Row = dict[str, object]


def refuse(error: UserError) -> None:
    """What is done about a bad row where nothing else is wanted."""
    raise error


def json_rows(path: Path) -> Iterator[Row]:
    """Every row as it stands: no column is given one type. Raises UserError that names file and row.

    Blank lines and a byte-order mark are passed over. Dates stay text, and half a surrogate pair stays half.
    """
    return (row for _, row in numbered_rows(path))


def numbered_rows(path: Path, on_bad: Callable[[UserError], None] = refuse) -> Iterator[tuple[int, Row]]:
    """(number, row). ``on_bad`` gets the error of a line that is no row, which is then passed over.

    Where rows are no lines, the place after a bad one is unknown: its error is raised.
    """
    with opened(path) as (file, _, _):
        number = -1
        for line_number, line in enumerate(_lines(path, file), 1):
            if not line or line.isspace():
                continue
            number += 1
            try:
                text = _decoded(line, path, number, line_number)
                if number == 0 and text.lstrip().startswith("["):
                    break
                row = _row(_decode(text), path, number)
            except UserError as error:
                on_bad(error)
            except (ValueError, RecursionError) as error:
                if number == 0 and _unfinished(error, text):
                    break
                on_bad(_refused(path, number, f" (line {line_number})", error))
            else:
                yield number, row
        else:
            return
        yield from enumerate(_whole(text, file, path))


def _lines(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    first = True
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise UserError(f"{path}: a line has more than {MAX_LINE >> 20} MB, the most that a row may have")
        yield line.removeprefix(codecs.BOM_UTF8) if first else line
        first = False


def _decoded(line: bytes, path: Path, number: int, line_number: int) -> str:
    try:
        return line.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} cannot be read as json: row {number} (line {line_number}) is not UTF-8 "
            f"(byte {error.start}: {line[error.start]:#04x})"
        ) from None


def _decode(text: str) -> object:
    try:
        value: object = _decoder.decode(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        value = _wide_decoder.decode(text)
    return value


def _unfinished(error: Exception, text: str) -> bool:
    """Whether the text may become right when more of it follows."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated") or error.pos >= len(text.rstrip())


def _whole(text: str, file: IO[bytes], path: Path) -> Iterator[Row]:
    """The rows of a file that is not made of lines, of which ``text`` was read."""
    rest = file.read(MAX_WHOLE + 1)
    if len(rest) > MAX_WHOLE:
        raise UserError(
            f"{path}: its first row does not end with its line, and such a file may have "
            f"{MAX_WHOLE >> 20} MB at most: write one object a line"
        )
    try:
        text += rest.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} cannot be read as json: it is not UTF-8 ({rest[error.start]:#04x})"
        ) from None
    number = 0
    try:
        for value in _values(text):
            yield _row({"text": value} if isinstance(value, str) else value, path, number)
            number += 1
    except (ValueError, RecursionError) as error:
        raise _refused(path, number, "", error) from None


def _values(text: str) -> Iterator[object]:
    """The elements of one array, or values one after the other."""
    place = _after_space(text, 0)
    if text.startswith("[", place):
        yield from _elements(text, _after_space(text, place + 1))
        return
    while place < len(text):
        value, place = _raw_decode(text, place)
        yield value
        place = _after_space(text, place)


def _elements(text: str, place: int) -> Iterator[object]:
    more = not text.startswith("]", place)
    while more:
        value, place = _raw_decode(text, place)
        yield value
        place = _after_space(text, place)
        more = text.startswith(",", place)
        place = _after_space(text, place + 1) if more else place
    if not text.startswith("]", place):
        raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
    if (end := _after_space(text, place + 1)) < len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _raw_decode(text: str, place: int) -> tuple[object, int]:
    try:
        return _decoder.raw_decode(text, place)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _wide_decoder.raw_decode(text, place)


def _after_space(text: str, place: int) -> int:
    space = _SPACE.match(text, place)
    return place if space is None else space.end()


def _row(value: object, path: Path, number: int) -> Row:
    if not isinstance(value, dict):
        kind = "null" if value is None else type(value).__name__
        raise UserError(f"{path} cannot be read as json: row {number} is no object but {kind}")
    return value


def _refused(path: Path, number: int, line: str, error: Exception) -> UserError:
    reason = str(error)
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at character {error.pos}"
    elif isinstance(error, RecursionError):
        reason = "it is nested too deeply"
    return UserError(f"{path} cannot be read as json: row {number}{line}: {reason}")
