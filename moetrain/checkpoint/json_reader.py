"""Reading a checkpoint's blocks through DCP: each is checked before any is read."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
)
from torch.futures import Future

from moetrain.checkpoint.blocks import BlockError, Slice, check_block
from moetrain.checkpoint.rows import StoredBlock

_Blocks = dict[MetadataIndex, list[ReadItem]]  # of one file, and what is to be read of each


class JsonReader(FileSystemReader):
    """DCP's reader of a checkpoint whose metadata is already decoded; it never opens ``.metadata``.

    Each block that a plan asks for is looked at before the first is read, see :func:`check_block`.
    """

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata
        entries: dict[str, Any] = dict(metadata.state_dict_metadata)
        self._blocks: dict[MetadataIndex, tuple[torch.dtype, torch.Size]] = {
            MetadataIndex(name, chunk.offsets): (entry.properties.dtype, chunk.sizes)
            for name, entry in entries.items()
            for chunk in entry.chunks
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, _Blocks] = {}
        for item in plan.items:
            file_name = self.storage_data[item.storage_index].relative_path
            by_file.setdefault(file_name, {}).setdefault(item.storage_index, []).append(item)
        for act in (self._check, self._read):
            for name, blocks in by_file.items():
                with (Path(self.path) / name).open("rb") as file:
                    act(file, blocks, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _check(self, file: BinaryIO, blocks: _Blocks, planner: LoadPlanner) -> None:
        for index in blocks:
            (dtype, sizes), place = self._blocks[index], self.storage_data[index]
            with _naming(index, place):
                check_block(Slice(file, place.offset, place.length), dtype, sizes)

    def _read(self, file: BinaryIO, blocks: _Blocks, planner: LoadPlanner) -> None:
        """No block is held as a whole, nor is the one before it, which DCP's own loop still has."""
        for index, items in blocks.items():
            place = self.storage_data[index]
            if any(item.type is LoadItemType.BYTE_IO for item in items):
                planner.load_bytes(items[0], io.BytesIO())  # refuses it
            with _naming(index, place):
                block = StoredBlock(Slice(file, place.offset, place.length), *self._blocks[index])
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    block.copy_part(item.storage_offsets, target)
                    planner.commit_tensor(item, target)


@contextmanager
def _naming(index: MetadataIndex, place: _StorageInfo) -> Iterator[None]:
    """Says of a BlockError which block it is about."""
    try:
        yield
    except BlockError as error:
        where = f"{place.relative_path}: the block of {index.fqn} at {list(index.offset or ())}"
        raise BlockError(f"{where}: {error}") from None


class TensorLoadPlanner(DefaultLoadPlanner):
    """Names are taken as they are, and an entry that is not a tensor is refused, never unpickled."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> NoReturn:
        raise ValueError(f"{read_item.dest_index.fqn} is not stored as a tensor")


def load_planner() -> LoadPlanner:
    return TensorLoadPlanner()
