"""Which files a path names, and what tells the content of a file from another's without reading all of it."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from moetrain.errors import UserError
from moetrain.files import open_regular

_SAMPLE = 4096  # bytes read at the start, in the middle and at the end of a file


def find_files(path: str, key: str = "data.path") -> list[Path]:
    """Every file that ``path`` names, sorted: a file, a folder (hidden names excepted) or a glob.

    Links to folders are followed; a folder that is reached twice, by links or in a circle, is read once.
    Raises UserError, which names ``key``, where there is none.
    """
    expanded = os.path.expanduser(path)
    if os.path.isfile(expanded):
        return [Path(expanded)]
    if os.path.isdir(expanded):
        found = {os.path.join(folder, name) for folder, names in _folders(expanded) for name in names}
    else:
        found = {name for name in _matching(expanded) if not os.path.isdir(name)}
    if not found:
        raise UserError(f"{key}={path} matches no file (looked from {os.getcwd()}): check the path or glob")
    return sorted(map(Path, found))


def _folders(root: str) -> Iterator[tuple[str, list[str]]]:
    """Each folder under ``root``, itself included, and the files in it."""

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from None

    seen = set()
    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield folder, [name for name in names if not name.startswith(".")]


def _matching(pattern: str) -> Iterator[str]:
    """As glob does, but for ``**``: glob follows links there too, and in a few circles for ever."""
    head, crossed, rest = _split(pattern)
    if not crossed:
        yield from glob.glob(pattern)
        return
    for root in glob.glob(head) if head else [os.curdir]:
        for folder, names in _folders(root):
            inside = folder if head else folder.removeprefix(os.curdir).removeprefix(os.sep)
            if rest:
                yield from _matching(os.path.join(glob.escape(inside), rest))
            else:
                yield from (os.path.join(inside, name) for name in names)


def _split(pattern: str) -> tuple[str, bool, str]:
    """What stands before the first part that is ``**``, whether there is one, and what stands after it."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return pattern, False, ""
    place = parts.index("**")
    head = os.sep.join(parts[:place]) or (os.sep if pattern.startswith(os.sep) else "")
    return head, True, os.sep.join(parts[place + 1 :])


def identity(path: Path) -> tuple[int, int, int, str]:
    """Size, times of change in nanoseconds, and a hash of up to three samples; all of a small file is read.

    A file that was written anew, or another in its place, has another time of change (ctime) even where size
    and mtime were put back; the samples tell them apart on file systems without one.
    """
    descriptor = open_regular(path)
    try:
        status = os.fstat(descriptor)
        size = status.st_size
        if size <= 3 * _SAMPLE:
            sample = os.pread(descriptor, 3 * _SAMPLE, 0)
        else:
            places = (0, size // 2, size - _SAMPLE)
            sample = b"".join(os.pread(descriptor, _SAMPLE, place) for place in places)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    finally:
        os.close(descriptor)
    return size, status.st_mtime_ns, status.st_ctime_ns, hashlib.sha256(sample).hexdigest()
