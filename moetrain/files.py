"""Reading small files that anybody may have written: bounded, checked by a schema, one line for a fault.

A schema is a type that pydantic understands, most often a frozen dataclass whose fields say types and ranges
(``Annotated[int, Field(ge=0)]``). Types are strict: "7" is no int and true is none either. Depth is bounded
by the parsers, size by ``limit``, and only regular files are opened, since a pipe or a device may never end.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]
from pydantic import TypeAdapter, ValidationError

from moetrain.errors import UserError, quoted

T = TypeVar("T")

MB = 10**6
_DEPTH = 50  # levels of a YAML file; a config of ours has five
_VALUES = 20_000  # of a YAML file; a config of ours has 200, and OmegaConf takes 0.1 ms for each
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same language, eight times as fast
_adapters: dict[Any, TypeAdapter[Any]] = {}  # making one compiles the schema


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, for reading. Raises UserError for anything else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe's opening would wait
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"cannot read {path}: it is not a regular file")
    return descriptor


def belongs(file: Path) -> bool:
    """A regular file that lies in its folder, or among the blobs of the same model in the hub's cache.

    The cache keeps ``<model>/snapshots/<revision>/<file>`` as links to ``<model>/blobs/<hash>``.
    """
    try:
        real, folder = file.resolve(strict=True), file.parent.resolve(strict=True)
    except (OSError, RuntimeError):  # a link to nothing, or to itself
        return False
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    return real.is_file() and any(real.is_relative_to(home) for home in homes)


def read_bytes(path: Path, limit: int) -> bytes:
    """A file's bytes. Raises UserError where it is missing, irregular or larger than ``limit`` bytes."""
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        size = path.stat().st_size
        raise UserError(f"cannot read {path}: it has {size} bytes, and such a file has {limit} at the most")
    return data


def read_json(path: Path, schema: type[T], limit: int) -> T:
    """A JSON file as a ``schema``. Raises UserError that names the file and the place in it."""
    return parse_json(read_bytes(path, limit), schema, str(path))


def parse_json(data: bytes | str, schema: type[T], where: str) -> T:
    """JSON text as a ``schema``. Raises UserError that begins with ``where`` and names the place."""
    try:
        value = _adapter(schema).validate_json(data, strict=True)
    except ValidationError as error:
        raise UserError(f"{where}: {_first(error)}") from None
    return value


def parse_yaml(data: bytes | str, where: str) -> object:
    """Plain values, as PyYAML's safe loader gives them. Raises UserError for what is no YAML.

    Aliases are refused, since nine lines of them can mean a billion values; so is deep nesting.
    """
    try:
        return yaml.load(bounded_yaml(data, where), _LOADER)
    except UserError:
        raise
    except Exception as error:  # PyYAML's constructors raise what int(), datetime() and re happen to raise
        raise UserError(f"{where} is no valid YAML: {' '.join(str(error).split())[:200]}") from None


def bounded_yaml(data: bytes | str, where: str) -> str:
    """The text of YAML whose values cannot be many more than its bytes. Raises UserError where they can.

    What is no YAML raises PyYAML's own error, or UnicodeDecodeError.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    depth = values = 0
    for event in yaml.parse(text, _LOADER):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{where}: line {line} has an alias (*{event.anchor}): write the value out")
        values += isinstance(event, yaml.NodeEvent)
        if values > _VALUES:
            raise UserError(f"{where}: line {line}: it holds more than {_VALUES} values")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEPTH:
            raise UserError(f"{where}: line {line} is nested deeper than {_DEPTH} levels")
    return text


def _adapter(schema: type[T]) -> TypeAdapter[T]:
    if schema not in _adapters:
        _adapters[schema] = TypeAdapter(schema)
    return _adapters[schema]


def _first(error: ValidationError) -> str:
    """The first thing that does not fit: its place, what is wrong, what was found."""
    found = error.errors(include_url=False, include_context=False)
    first, given = found[0], found[0]["input"]
    place = ".".join(quoted(part).strip("'") for part in first["loc"])
    whole = first["type"] == "json_invalid" or isinstance(given, (dict, list, tuple))
    value = "" if whole else f" (found {quoted(given)})"
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{place + ': ' if place else ''}{first['msg']}{value}{more}"
