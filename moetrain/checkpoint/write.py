"""torch.distributed.checkpoint's file storage, without its pickles and with an atomic, hashed end.

DCP plans, deduplicates and reshards; this module changes what it leaves on disk. Its ``.metadata`` is a
pickle: here it is JSON. Its byte entries are unpickled on load: here there are none, and loading one is an
error. ``rows.py`` reads tensor blocks by ``torch.load(weights_only=True)``.

A save is one pass of DCP's own protocol, so a failure on any rank reaches all of them: every rank hashes its
file while writing it (:class:`JsonWriter.write_data`), and the coordinator writes the JSON files, then the
manifest, and renames the temporary folder (:class:`JsonWriter.finish`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import shutil
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, BinaryIO, cast

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from moetrain.checkpoint.folders import TEMPORARY, remove_folder, replace_folder, sync_folder
from moetrain.checkpoint.format import EXTRA, MANIFEST, METADATA, encode_metadata
from moetrain.checkpoint.manifest import FileRecord, Manifest, encode_manifest
from moetrain.errors import UserError

# Saving without a process group is what was asked for; the background thread cannot mute this by itself.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class _HashedFile(io.BufferedIOBase):
    """A file being written: counts and hashes the bytes, and keeps the error of a failed write.

    torch.save reports a full disk as a RuntimeError about stream positions; ``error`` keeps the cause.
    """

    def __init__(self, file: BinaryIO, hashed: bool) -> None:
        self._file = file
        self._digest = hashlib.sha256() if hashed else None
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        if self._digest is not None:
            self._digest.update(data)
        count = memoryview(data).nbytes
        self.size += count
        return count

    def flush(self) -> None:
        if self._file.closed:
            return
        try:
            self._file.flush()
        except OSError as error:
            self.error = error
            raise

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        return self._file.fileno()

    def record(self, name: str) -> FileRecord:
        return FileRecord(name, self.size, None if self._digest is None else self._digest.hexdigest())


class _HashingFileSystem(FileSystem):
    """DCP's file system whose written files are recorded with size and hash, in ``written``."""

    def __init__(self, hashed: bool) -> None:
        self._hashed = hashed
        self.written: list[FileRecord] = []

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        name = os.path.basename(path)
        stream: _HashedFile | None = None
        try:
            with open(path, "wb") as file:
                stream = _HashedFile(cast(BinaryIO, file), self._hashed)
                yield stream
        except Exception as error:
            cause = stream.error if stream is not None and stream.error is not None else error
            if isinstance(cause, OSError):
                # Plain and with the file's name: it travels to the other ranks.
                raise OSError(cause.errno, cause.strerror, name) from None
            raise
        self.written.append(stream.record(name))

    def write_text(self, folder: Path, name: str, text: str) -> FileRecord:
        with self.create_stream(folder / name, "wb") as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
        return self.written[-1]


class JsonWriter(FileSystemWriter):
    """Writes one checkpoint into ``<folder of target>/.tmp_<name of target>`` and renames it to ``target``.

    ``one_file_each``: a file for each tensor, since DCP holds a file's tensors in memory until it is written.
    ``extra`` is the text of ``extra.json`` (the coordinator's counts). On the coordinator ``guard`` runs
    before the temporary folder is made and before the rename, and raises where nothing may be written;
    ``on_complete`` runs after it and must not raise. Everything is fsynced in order: files, folder, rename,
    parent folder.
    """

    def __init__(
        self,
        target: Path,
        step: int,
        extra: str,
        hashed: bool,
        on_complete: Callable[[], None],
        one_file_each: bool = False,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self.temporary = target.parent / f"{TEMPORARY}{target.name}"
        super().__init__(self.temporary, single_file_per_rank=not one_file_each, sync_files=True)
        self._files = _HashingFileSystem(hashed)
        self.fs = self._files
        self._target, self._step, self._extra = target, step, extra
        self._on_complete, self._guard = on_complete, guard
        self._coordinator = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy on the CPU, 0-dimensional DTensors included, so that training may go on."""
        self.per_thread_copy_ahead = 0
        return {name: value.detach().to("cpu", copy=True) for name, value in state_dict.items()}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        self._coordinator = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if self._coordinator:  # the others write only after its plan has arrived
            self._guard()
            remove_folder(self.temporary)
            self.temporary.mkdir(parents=True)
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """DCP's results, and one more per file: its record, under an index that no tensor has."""
        results = super().write_data(plan, planner).value()
        results += [WriteResult(MetadataIndex(f.name), f.size, f) for f in self._files.written]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [result for of_rank in results for result in of_rank]
        records = [r.storage_data for r in written if isinstance(r.storage_data, FileRecord)]
        blocks = {r.index: r.storage_data for r in written if not isinstance(r.storage_data, FileRecord)}
        self._guard()
        self._check_visible(records, ranks=len(results))
        text = encode_metadata(dataclasses.replace(metadata, storage_data=blocks))
        records.append(self._files.write_text(self.temporary, METADATA, text))
        records.append(self._files.write_text(self.temporary, EXTRA, self._extra))
        manifest = encode_manifest(Manifest(self._step, tuple(records)))
        self._files.write_text(self.temporary, MANIFEST, manifest.decode("ascii"))
        sync_folder(self.temporary)
        self._guard()
        replace_folder(self.temporary, self._target)
        self._on_complete()

    def _check_visible(self, records: list[FileRecord], ranks: int) -> None:
        for record in records:
            path = self.temporary / record.name
            if not path.exists() or path.stat().st_size != record.size:
                unshared = ", or is not on storage that all nodes share" if ranks > 1 else ""
                raise UserError(
                    f"{path} is not as it was written: something else changes its folder{unshared}"
                )


def save_planner() -> SavePlanner:
    return DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


def save_error(error: CheckpointException, target: Path, nbytes: int) -> Exception:
    """The error of a failed save, the same on every rank: the first rank's cause, and the free space."""
    rank, (cause, _) = sorted(error.failures.items())[0]
    if isinstance(cause, UserError):
        return cause
    if not isinstance(cause, OSError):
        return RuntimeError(f"checkpoint {target} was not saved: rank {rank}: {one_line(cause)}")
    where = f" ({cause.filename})" if cause.filename else ""
    try:
        free = f"{shutil.disk_usage(target.parent).free:,}"
    except OSError:
        free = "an unknown number of"
    return UserError(
        f"checkpoint {target} was not saved: rank {rank}: {cause.strerror or one_line(cause)}{where}; "
        f"its tensors take {nbytes:,} bytes, {free} bytes are free there; earlier checkpoints are kept"
    )


def raise_interrupt(error: CheckpointException) -> None:
    """Raise a KeyboardInterrupt that DCP has caught as a failure like any other."""
    for cause, _ in error.failures.values():
        if isinstance(cause, KeyboardInterrupt):
            raise cause


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
