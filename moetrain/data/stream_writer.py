"""Writing a stream of a store, document by document; ``moetrain/data/shards.py`` says what its files are.

Shapes: N tokens of a document.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moetrain.data.manifest import COLUMNS, MASK_COLUMNS, column_name, mask_name, shard_name
from moetrain.data.shards import describe_file

SHARD_TOKENS = 256 * 2**20


class Mask(NamedTuple):
    """Which tokens of a document train; the file and the row that it came from.

    A document's first token never trains: nothing stands before it.
    """

    trains_N: npt.NDArray[np.bool_]
    file: int
    row: int

    def columns(self) -> dict[str, int]:
        places = np.flatnonzero(self.trains_N)
        first = int(places[0]) if len(places) else len(self.trains_N)
        return {"trained": len(places), "firsts": first, "files": self.file, "rows": self.row}


class StreamWriter:
    """Appends documents to one stream; holds no more than the document at hand in memory.

    ``masked``: documents train in part, and each is added with its mask.
    """

    def __init__(
        self, folder: Path, name: str, dtype: str, shard_tokens: int = SHARD_TOKENS, masked: bool = False
    ) -> None:
        self._folder, self._name, self._dtype, self._shard_tokens = folder, name, dtype, shard_tokens
        self._masked = masked
        names = COLUMNS | MASK_COLUMNS if masked else COLUMNS
        self._columns = {column: self._open(column_name(name, column)) for column in names}
        self._shards: list[IO[bytes]] = []
        self._masks: list[IO[bytes]] = []
        self.tokens = self.documents = self.bytes = self.counted_bytes = 0

    def _open(self, name: str) -> IO[bytes]:
        return (self._folder / name).open("wb")

    def add(
        self,
        tokens_N: npt.NDArray[np.int64],
        num_bytes: int,
        counted_bytes: int,
        domain: int,
        mask: Mask | None = None,
    ) -> None:
        """``counted_bytes`` is what the tokens' own lengths add up to, where ``num_bytes`` is the truth."""
        assert (mask is not None) == self._masked, "a masked stream has a mask for each document, others none"
        written = 0
        while written < len(tokens_N):
            room = -self.tokens % self._shard_tokens
            if room == 0:
                self._next_shard()
                room = self._shard_tokens
            piece = tokens_N[written : written + room]
            self._shards[-1].write(piece.astype(self._dtype).tobytes())
            if mask is not None:
                self._masks[-1].write(mask.trains_N[written : written + room].astype(np.uint8).tobytes())
            written += len(piece)
            self.tokens += len(piece)
        self.documents += 1
        self.bytes += num_bytes
        self.counted_bytes += counted_bytes
        values = {"ends": self.tokens, "bytes": num_bytes, "domains": domain}
        for column, value in (values | (mask.columns() if mask is not None else {})).items():
            self._columns[column].write(np.array(value, (COLUMNS | MASK_COLUMNS)[column]).tobytes())

    def _next_shard(self) -> None:
        for handles, name in ((self._shards, shard_name), (self._masks, mask_name)):
            if handles:
                handles[-1].close()
            if handles is self._shards or self._masked:
                handles.append(self._open(name(self._name, len(handles))))

    def close(self) -> dict[str, Any]:
        """Flush to the disk and return the stream's entry in the manifest."""
        handles = [*self._shards, *self._masks, *self._columns.values()]
        for handle in handles:
            if not handle.closed:
                handle.flush()
                os.fsync(handle.fileno())
                handle.close()
        files = [describe_file(Path(handle.name)) for handle in handles]
        counts = {name: getattr(self, name) for name in ("tokens", "documents", "bytes", "counted_bytes")}
        entry = {"shards": len(self._shards), "files": files, **counts}
        return entry | {"masked": True} if self._masked else entry
