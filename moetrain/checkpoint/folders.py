"""Replacing and removing folders atomically, even if the process is killed meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

TEMPORARY = ".tmp_"
_OLD = f"{TEMPORARY}old_"


def replace_folder(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; a folder already there steps aside first and is removed after."""
    old = target.parent / f"{_OLD}{target.name}"
    remove_folder(old)
    if target.exists():
        os.replace(target, old)
    os.replace(source, target)
    sync_folder(target.parent)
    with contextlib.suppress(OSError):  # the next start tries again
        remove_folder(old)


def clean_folder(folder: Path) -> None:
    """Remove what a killed process left, and rename back what :func:`replace_folder` had set aside."""
    for old in folder.glob(f"{_OLD}*"):
        target = folder / old.name.removeprefix(_OLD)
        if not target.exists():
            os.replace(old, target)
    for leftover in folder.glob(f"{TEMPORARY}*"):
        remove_folder(leftover)


def remove_folder(path: Path) -> None:
    """Remove ``path`` if it exists. It is renamed first, so that no checkpoint is ever incomplete."""
    with contextlib.suppress(FileNotFoundError):
        if not path.name.startswith(TEMPORARY):
            hidden = path.parent / f"{TEMPORARY}delete_{path.name}"
            remove_folder(hidden)
            path = path.rename(hidden)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync_folder(path: Path) -> None:
    """fsync of a folder's entries, on file systems that have it."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
