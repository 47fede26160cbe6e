"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moetrain.errors import UserError
from moetrain.terminal import as_text


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` when the block ends; if it raises, nothing is left.

    The data are on the disk before the name is. Raises OSError.
    """
    temporary = path.with_name(f".tmp_{path.name}.{os.getpid()}")  # two processes may write one report
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_atomic(path: Path, text: str) -> None:
    """Write a whole file of UTF-8. Raises UserError where that fails."""
    try:
        with replacing(path) as temporary:
            temporary.write_text(as_text(text), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def keep_others_out() -> None:
    """What this process makes from here on is not writable for everybody, whatever umask it was given."""
    os.umask(os.umask(0o077) | stat.S_IWOTH)
