"""Source ``hub``: the first documents of a data set on the Hugging Face hub, streamed once and kept."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moetrain.data.cache import build_once
from moetrain.data.documents import Document, digest_of
from moetrain.data.sources.offline import import_datasets
from moetrain.errors import UserError

DOMAIN = "hub"
_SPOOL = "documents.jsonl"


class HubSource:
    """At most ``max_documents`` rows of ``path`` (owner/name), spooled to ``root/hub`` as they stream in.

    Preparing a corpus reads its text several times; the spool makes that one download, and lets later runs
    work without a network. Delete its folder to fetch a newer version.
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
        self.folder = root / "hub" / f"{path.replace('/', '--')}-{self.fingerprint()[:16]}"

    @property
    def label(self) -> str:
        return f"the hub's {self.path}"

    def fingerprint(self) -> str:
        return digest_of("hub", self.path, self.name, self.split, self.text_key, self.max_documents)

    def documents(self) -> Iterator[Document]:
        folder = build_once(self.folder, lambda temporary: self._download(temporary / _SPOOL))
        with (folder / _SPOOL).open(encoding="utf-8") as lines:
            for line in lines:
                yield Document(json.loads(line), DOMAIN)

    def _download(self, target: Path) -> None:
        datasets = import_datasets(f"data=hub data.path={self.path}")
        try:
            rows = datasets.load_dataset(self.path, self.name, split=self.split, streaming=True)
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
