"""The rows of a Parquet file: of the columns asked for, a few rows at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moetrain.data.sources.json_rows import refuse
from moetrain.errors import UserError
from moetrain.files import open_regular

_BATCH = 256  # rows held at once
_BUFFER = 2**20  # bytes of a column read ahead: a whole column of a row group may be gigabytes

Row = dict[str, object]


def parquet_rows(path: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    """Each row's values of ``columns`` (name -> the option that named it); all others are never read.

    Bytes are text in UTF-8: older writers do not mark text as such. Raises UserError that names the file.
    """
    return (row for _, row in numbered_rows(path, columns))


def numbered_rows(
    path: Path,
    columns: Mapping[str, str],
    optional: Collection[str] = (),
    on_bad: Callable[[UserError], None] = refuse,
) -> Iterator[tuple[int, Row]]:
    """(number, row). ``optional``: columns that are read where the file has them.

    ``on_bad`` gets the error of a row whose text is not UTF-8, which is then passed over.
    """
    number = 0
    with os.fdopen(open_regular(path), "rb") as raw:
        try:
            file = pq.ParquetFile(raw, buffer_size=_BUFFER, pre_buffer=False)
            if not file.metadata.num_rows:
                return
            present = file.schema_arrow.names
            names = [*columns, *(name for name in optional if name in present and name not in columns)]
            _check(
                path, present, {name: columns.get(name, "which is read where it is there") for name in names}
            )
            for batch in file.iter_batches(_BATCH, columns=names):
                values = [batch.column(batch.schema.get_field_index(name)) for name in names]
                for row in zip(*values, strict=True):
                    try:
                        plain = {name: _plain(value) for name, value in zip(names, row, strict=True)}
                    except UnicodeDecodeError as error:
                        on_bad(UserError(f"{path}, row {number}: not UTF-8 text ({error.reason})"))
                    else:
                        yield number, plain
                    number += 1
        except OSError as error:
            if error.errno:
                raise UserError(f"cannot read {path}: {error.strerror}") from error
            raise _refused(path, error) from error
        except (pa.ArrowException, ValueError, MemoryError) as error:
            raise _refused(path, error) from error


def _check(path: Path, names: list[str], columns: Mapping[str, str]) -> None:
    for name, option in columns.items():
        if name not in names:
            raise UserError(f"{path} has no column {name!r} ({option}); it has: {listed(names)}")
        if names.count(name) > 1:
            raise UserError(f"{path} has {names.count(name)} columns {name!r} ({option})")


def listed(names: list[str]) -> str:
    """The names in one line, the first twenty of them."""
    shown = sorted(names)[:20]
    return ", ".join(shown) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _plain(value: pa.Scalar) -> object:
    plain: object = value.as_py()
    return plain.decode() if isinstance(plain, bytes) else plain


def _refused(path: Path, error: Exception) -> UserError:
    lines = str(error).splitlines() or [type(error).__name__]
    return UserError(f"{path} cannot be read as parquet: {lines[0]}")
