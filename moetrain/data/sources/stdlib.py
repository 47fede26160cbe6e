"""Source ``stdlib``: the running interpreter's library and documentation topics, text on every machine."""

from __future__ import annotations

import importlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from moetrain.data.documents import Document, digest_of
from moetrain.data.sources.paths import identity
from moetrain.errors import UserError

CODE, DOCS = "python_code", "english_docs"
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# The topics are documents of their own: read as code too, one text could stand on both sides of the split.
_TOPICS_FILE = os.path.join("pydoc_data", "topics.py")


class StdlibSource:
    """One ``.py`` file, or one ``help()`` topic, is one document. Files that are not UTF-8 are skipped."""

    def __init__(self, code_domain: str = CODE, docs: bool = True) -> None:
        self.root = Path(sysconfig.get_paths()["stdlib"])
        self.code_domain = code_domain
        self.docs = docs

    @property
    def label(self) -> str:
        return f"Python's standard library in {self.root}"

    @cached_property
    def files(self) -> list[Path]:
        """Sorted; without tests, and without what pip installed."""
        found = []
        for folder, subfolders, names in os.walk(self.root):
            subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
            found += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
        found = [path for path in found if str(path.relative_to(self.root)) != _TOPICS_FILE]
        if not found:
            raise UserError(f"no .py files in {self.root} (data=stdlib): use data=local data.path=...")
        return found

    def fingerprint(self) -> str:
        topics = [path] if (path := self.root / _TOPICS_FILE).is_file() else []
        listing = [(str(path.relative_to(self.root)), identity(path)) for path in self.files + topics]
        return digest_of("stdlib", platform.python_version(), self.code_domain, self.docs, listing)

    def documents(self) -> Iterator[Document]:
        for path in self.files:
            try:
                yield Document(path.read_bytes().decode("utf-8-sig"), self.code_domain)
            except (UnicodeDecodeError, OSError):
                continue
        if self.docs:
            for _, text in sorted(topics().items()):
                yield Document(text, DOCS)


def topics() -> dict[str, str]:
    """The texts behind ``help("FLOAT")`` and the like; some slim builds of Python leave them out."""
    try:
        found: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return {}
    return found
