"""Source ``local``: the user's own files. A text file is one document; a row of jsonl or parquet is one."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moetrain.config.schema_data import TextFormat
from moetrain.data.documents import Document, digest_of
from moetrain.data.sources.offline import offline_datasets
from moetrain.errors import UserError

DOMAIN = "local"
_SUFFIXES = {
    ".jsonl": TextFormat.jsonl,
    ".ndjson": TextFormat.jsonl,
    ".json": TextFormat.jsonl,
    ".parquet": TextFormat.parquet,
}
_BUILDERS = {TextFormat.jsonl: "json", TextFormat.parquet: "parquet"}


class LocalSource:
    """A file, a folder (all its files, hidden ones excepted) or a glob (``**`` crosses folders).

    ``format=auto`` goes by the suffix of each file (.jsonl .ndjson .json .parquet, all else is text); a
    suffix ``.gz`` after one of the first three is undone. Rows without text (null) are skipped. Raises
    UserError for a path that matches nothing, and for a file or a row that cannot be read as text.
    """

    def __init__(
        self,
        path: str,
        format: TextFormat = TextFormat.auto,
        text_key: str = "text",
        domain_key: str | None = None,
    ) -> None:
        self.path, self.format, self.text_key, self.domain_key = path, format, text_key, domain_key
        self.files = find_files(path)

    @property
    def label(self) -> str:
        return f"data.path={self.path}"

    def fingerprint(self) -> str:
        try:
            stats = [(str(file), file.stat()) for file in find_files(self.path)]
        except OSError as error:
            raise _unreadable(Path(error.filename), error) from error
        listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return digest_of("local", self.format.value, self.text_key, self.domain_key, listing)

    def documents(self) -> Iterator[Document]:
        for file in self.files:
            format = self._format_of(file)
            if format is TextFormat.text:
                yield self._text_document(file)
            elif file.stat().st_size:  # the json reader cannot infer anything from an empty file
                yield from self._rows(file, _BUILDERS[format])

    def _format_of(self, file: Path) -> TextFormat:
        if self.format is not TextFormat.auto:
            return self.format
        suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() != ".gz"]
        return _SUFFIXES.get(suffixes[-1], TextFormat.text) if suffixes else TextFormat.text

    def _text_document(self, file: Path) -> Document:
        if self.domain_key is not None:
            raise UserError(
                f"data.domain_key={self.domain_key}: {file} is plain text, which has no such column"
            )
        try:
            raw = file.read_bytes()
            text = raw.decode("utf-8-sig")
        except OSError as error:
            raise _unreadable(file, error) from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file} is not UTF-8 text (byte {error.start}: {raw[error.start]:#04x}); "
                "convert it, or let data.path leave it out"
            ) from error
        if "\0" in text:
            raise UserError(f"{file} is binary (NUL byte at character {text.index(chr(0))}), not text")
        return Document(text, DOMAIN)

    def _rows(self, file: Path, builder: str) -> Iterator[Document]:
        for number, row in enumerate(_read_rows(file, builder)):
            text = self._value(row, self.text_key, "data.text_key", file)
            if text is None:
                continue
            if not isinstance(text, str):
                kind = type(text).__name__
                raise UserError(f"{file}, row {number}: {self.text_key!r} holds {kind}, not text")
            domain = DOMAIN
            if self.domain_key is not None:
                domain = str(self._value(row, self.domain_key, "data.domain_key", file))
            yield Document(text, domain)

    def _value(self, row: dict[str, Any], key: str, option: str, file: Path) -> Any:
        if key not in row:
            raise UserError(f"{file} has no column {key!r} ({option}); it has: {', '.join(sorted(row))}")
        return row[key]


def find_files(path: str) -> list[Path]:
    """Every file that ``path`` names, sorted."""
    expanded = os.path.expanduser(path)
    if os.path.isfile(expanded):
        return [Path(expanded)]
    if os.path.isdir(expanded):
        inside = (file for file in Path(expanded).rglob("*") if not file.is_dir())
        found = [file for file in inside if not _hidden(file.relative_to(expanded))]
    else:
        found = [Path(name) for name in glob.glob(expanded, recursive=True) if not os.path.isdir(name)]
    if not found:
        raise UserError(
            f"data.path={path} matches no file (looked from {os.getcwd()}): check the path or glob"
        )
    return sorted(found)


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _read_rows(file: Path, builder: str) -> Iterator[dict[str, Any]]:
    """Stream one file: no Arrow copy of it is written, and a failure can name it."""
    with (
        offline_datasets(f"reading {file}") as datasets,
        tempfile.TemporaryDirectory(prefix="moetrain-datasets-") as scratch,
    ):
        try:
            yield from datasets.load_dataset(
                builder,
                data_files=glob.escape(str(file.absolute())),
                split="train",
                streaming=True,
                cache_dir=scratch,
            )
        except StopIteration:  # how the json reader says that the file holds blank lines only
            return
        except OSError as error:
            raise _unreadable(file, error) from error
        except Exception as error:  # Arrow and the library raise many kinds, all meaning a bad file
            lines = str(error).splitlines() or [type(error).__name__]
            raise UserError(f"{file} cannot be read as {builder}: {lines[0]}") from error


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"cannot read {file}: {error.strerror or error}")
