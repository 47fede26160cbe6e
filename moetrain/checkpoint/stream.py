"""Checkpoints read and written tensor by tensor in one process, for converters that hold no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from moetrain.checkpoint.folders import remove_folder
from moetrain.checkpoint.json_reader import JsonReader, load_planner
from moetrain.checkpoint.read import find_checkpoint, read_metadata
from moetrain.checkpoint.write import (
    JsonWriter,
    one_line,
    raise_interrupt,
    save_error,
)
from moetrain.errors import UserError
from moetrain.models.hf.source import TensorInfo


class StoredTensors:
    """The tensors of one intact checkpoint, by name.

    ``path`` is a checkpoint or a run folder, whose newest one is meant. Raises UserError when there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = find_checkpoint(path)
        self._metadata, complaint = read_metadata(self.path)
        if complaint:
            raise UserError(complaint)
        entries: dict[str, Any] = dict(self._metadata.state_dict_metadata)
        self.tensors = {
            name: TensorInfo(tuple(entry.size), entry.properties.dtype) for name, entry in entries.items()
        }

    def read(self, name: str) -> Tensor:
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        reader = JsonReader(self.path, self._metadata)
        try:
            dcp_load({name: tensor}, storage_reader=reader, planner=load_planner(), no_dist=True)
        except CheckpointException as error:
            raise_interrupt(error)
            _, (cause, _) = next(iter(error.failures.items()))
            raise UserError(f"checkpoint {self.path}: {name} cannot be read: {one_line(cause)}") from error
        return tensor


class _LazyPlanner(DefaultSavePlanner):
    """Plans with tensors of the meta device, and reads their values one by one as they are written."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._read(write_item.index.fqn)


def write_streamed(
    target: Path,
    step: int,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    extra: Callable[[], Mapping[str, Any]],
) -> None:
    """Write the checkpoint ``target``; ``read`` is asked for each tensor once, in order, then ``extra``.

    Memory holds one tensor and the one before it: see :func:`large_then_small`. Raises UserError when it
    cannot be written; nothing is left then.
    """
    writer = _LateWriter(target, step, extra)
    empty = {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in tensors.items()}
    try:
        dcp_save(empty, storage_writer=writer, planner=_LazyPlanner(read), no_dist=True)
    except CheckpointException as error:
        remove_folder(writer.temporary)
        raise_interrupt(error)
        raise save_error(error, target, sum(info.nbytes for info in tensors.values())) from error


def large_then_small(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """``tensors``, sorted so that no large one follows another: DCP holds one while it reads the next."""
    by_size = sorted(tensors, key=lambda name: tensors[name].nbytes)
    half = len(by_size) // 2
    small, large = reversed(by_size[:half]), by_size[half:]
    return {name: tensors[name] for pair in zip_longest(large, small) for name in pair if name is not None}


class _LateWriter(JsonWriter):
    """A writer whose ``extra.json`` (with the tensors' hashes) is known only after the tensors."""

    def __init__(self, target: Path, step: int, extra: Callable[[], Mapping[str, Any]]) -> None:
        super().__init__(target, step, "", hashed=True, on_complete=lambda: None, one_file_each=True)
        self._late = extra

    def finish(self, metadata: Any, results: Any) -> None:
        self._extra = json.dumps(self._late(), indent=1) + "\n"
        super().finish(metadata, results)
