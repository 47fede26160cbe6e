"""Source ``hub``: the first documents of a data set on the Hugging Face hub, streamed once and kept."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moetrain.data.cache import build_once
from moetrain.data.documents import Document, digest_of
from moetrain.data.sources.paths import identity
from moetrain.errors import UserError

DOMAIN = "hub"
_SPOOL = "documents.jsonl"


class HubSource:
    """At most ``max_documents`` rows of ``path`` (owner/name), spooled to ``root/hub`` as they stream in.

    Preparing a corpus reads its text several times; the spool makes that one download, and lets later runs
    work without a network. Delete its folder to fetch a newer version: what was tokenised of the old one is
    not taken for it.
    """

    def __init__(
        self,
        root: Path,
        path: str,
        name: str | None = None,
        split: str = "train",
        text_key: str = "text",
        max_documents: int = 100_000,
    ) -> None:
        if max_documents < 1:
            raise UserError(f"data.max_documents={max_documents}: must be at least 1")
        self.path, self.name, self.split = path, name, split
        self.text_key, self.max_documents = text_key, max_documents
        request = digest_of("hub", path, name, split, text_key, max_documents)
        self.folder = root / "hub" / f"{path.replace('/', '--')}-{request[:16]}"

    @property
    def label(self) -> str:
        return f"the hub's {self.path}"

    def fingerprint(self) -> str:
        """Of the spool, which is made where it is missing."""
        return digest_of("hub", self.folder.name, identity(self._spooled()))

    def documents(self) -> Iterator[Document]:
        spool = self._spooled()
        with spool.open(encoding="utf-8") as lines:
            for line in lines:
                try:
                    text = json.loads(line)
                except (ValueError, RecursionError):
                    text = None
                if not isinstance(text, str):
                    raise UserError(
                        f"damaged data: {spool} holds a line that is no text; delete {self.folder}"
                    )
                yield Document(text, DOMAIN)

    def _spooled(self) -> Path:
        return build_once(self.folder, lambda temporary: self._download(temporary / _SPOOL)) / _SPOOL

    def _download(self, target: Path) -> None:
        datasets = _import_datasets(f"data=hub data.path={self.path}")
        try:
            rows = datasets.load_dataset(self.path, self.name, split=self.split, streaming=True)
            if self.text_key in (rows.column_names or ()):  # others may need packages to be decoded
                rows = rows.select_columns([self.text_key])
            self.spool(rows, target)
        except UserError:
            raise
        except Exception as error:  # the network, the hub and the data set's own format fail in many ways
            lines = str(error).splitlines() or [""]
            raise UserError(
                f"data=hub: cannot stream {self.path} (split {self.split}): {type(error).__name__}: "
                f"{lines[0]}; check the name and the network, or use data=local"
            ) from error

    def spool(self, rows: Iterable[dict[str, Any]], target: Path) -> None:
        """Write the texts of the first ``max_documents`` rows, one JSON string a line."""
        with target.open("w", encoding="utf-8") as out:
            for number, row in enumerate(itertools.islice(rows, self.max_documents)):
                if self.text_key not in row:
                    raise UserError(
                        f"{self.path} has no column {self.text_key!r} (data.text_key); it has: "
                        + ", ".join(sorted(row))
                    )
                text = row[self.text_key]
                if not isinstance(text, str | None):
                    raise UserError(f"{self.path}, row {number}: {self.text_key!r} is not text")
                if text is not None:
                    out.write(json.dumps(text) + "\n")


def _import_datasets(needed_for: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(f"{needed_for} needs the package datasets ({error}): pip install datasets") from error
