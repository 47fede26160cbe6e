"""Saving and loading the whole training state, under any layout, never half and never unnoticed when damaged.

A checkpoint is the folder ``step_00000100`` (see :mod:`moetrain.train.checkpoint_format`), written by
torch.distributed.checkpoint (see :mod:`moetrain.train.checkpoint_io`): tensors keyed by name with global
shapes, so that any number of ranks and any sharding loads what any other saved.

Every method of :class:`Checkpointer` is collective: all ranks call it, in the same order. They all return the
same value or all raise. UserError is for what the user can mend (a full disk, a damaged checkpoint, another
model); :class:`moetrain.train.stopping.PeerLostError` means that a rank is gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from moetrain.errors import UserError
from moetrain.train.checkpoint_format import (
    EXTRA,
    METADATA,
    FormatError,
    decode_metadata,
    dtype_name,
    verify,
)
from moetrain.train.checkpoint_io import (
    TEMPORARY,
    JsonReader,
    JsonWriter,
    Peers,
    load_planner,
    remove_folder,
    save_planner,
)
from moetrain.train.stopping import raising_peer_lost

CHECKPOINTS = "checkpoints"
ASIDE = "abandoned"
_STEP = re.compile(r"step_(\d{8,})")
_LISTED = 10  # names in one error message

log = logging.getLogger(__name__)


@dataclass
class _Pending:
    """A save in the background."""

    future: Future[Any]
    writer: JsonWriter
    step: int
    nbytes: int


class Checkpointer:
    """The checkpoints of one run, in the folder ``dir``.

    ``keep_last`` (at least 1) newest ones are kept. ``async_save`` copies the state to the CPU and writes in a
    thread: at most one save is under way, and its failure is raised by the next :meth:`save`, :meth:`wait` or
    :meth:`close`. ``hash=False`` records sizes only. ``group``: the ranks that take part, None for all.
    Constructing one removes what a killed run left half-written; only the training of this run may do so.
    """

    def __init__(
        self,
        dir: Path,
        keep_last: int = 3,
        async_save: bool = False,
        hash: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last}: at least the newest checkpoint is kept")
        self.dir = Path(dir)
        self.last_saved: int | None = None  # the step of the newest completed save of this object
        self._keep_last, self._async, self._hash = keep_last, async_save, hash
        self._peers = Peers(group, background=async_save)
        self._pending: _Pending | None = None
        self._verified: set[Path] = set()
        self._peers.from_first(self._clean)

    def path(self, step: int) -> Path:
        """The folder of the checkpoint after ``step`` optimizer steps."""
        return self.dir / f"step_{step:08d}"

    def save(self, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> Path:
        """Save ``tensors`` (name -> tensor or DTensor, the same names on all ranks) and rank 0's ``extra``.

        ``extra`` is JSON-able with string keys. Replaces a checkpoint of the same step, then removes those
        beyond ``keep_last``. Returns its folder, which with ``async_save`` appears when the writing is done.
        Raises UserError when it cannot be written: the half-written folder is gone, earlier ones are kept.
        """
        self.wait()
        text = json.dumps(extra, indent=1) + "\n"
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        for name, tensor in tensors.items():
            if tensor.layout != torch.strided or tensor.is_meta:
                raise TypeError(f"{name}: a checkpoint holds dense tensors with values only")
            dtype_name(tensor.dtype)
        target = self.path(step)
        writer = JsonWriter(target, step, text, self._hash, lambda: self._prune(step))
        arguments: dict[str, Any] = {
            "storage_writer": writer,
            "planner": save_planner(),
            "process_group": self._peers.group,
            "no_dist": self._peers.group is None,
        }
        self._verified.discard(target)
        with self._saving(writer, step, nbytes):
            if self._async:
                future = cast(Future[Any], dcp.async_save(dict(tensors), **arguments))
                if self._peers.rank == 0:
                    future.add_done_callback(lambda done: _discard_if_failed(done, writer))
                self._pending = _Pending(future, writer, step, nbytes)
                return target
            dcp.save(dict(tensors), **arguments)
        self.last_saved = step
        return target

    def wait(self) -> None:
        """Returns when no save is under way; raises what made the last one fail."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with self._saving(pending.writer, pending.step, pending.nbytes):
            pending.future.result()
        self.last_saved = pending.step

    def close(self) -> None:
        """Wait for a save under way; call it before the process group is destroyed."""
        self.wait()

    def steps(self) -> list[int]:
        """The steps of the checkpoints in the folder, oldest first, damaged ones included."""
        return self._peers.from_first(lambda: _steps(self.dir))

    def latest_valid(self) -> Path | None:
        """The newest checkpoint whose files are all there and match their hashes; None if there is none.

        A damaged one is named in a warning with what is wrong, and passed over.
        """
        self.wait()
        for step in reversed(self.steps()):
            path = self.path(step)
            problems = self._verify(path)
            if not problems:
                return path
            if self._peers.rank == 0:
                log.warning(
                    "checkpoint %s is damaged and is passed over: %s", path, _listing(problems, "; ")
                )
        return None

    def resolve(self, resume: str) -> Path | None:
        """The checkpoint that the ``resume`` key means, or None for a fresh start.

        ``auto``: the newest valid one here, None when there is none at all, and an error when every one is
        damaged, since a fresh start would replace them. ``none``: None, and an error when there are any here.
        Else a path: a checkpoint, which must be intact, or a run folder, whose newest valid one is meant.
        """
        steps = self.steps()
        if resume == "none":
            if steps:
                raise UserError(
                    f"resume=none, but {self.dir} already holds {len(steps)} checkpoint(s): "
                    "choose another run.dir, or resume=auto to go on from the newest"
                )
            return None
        if resume != "auto":
            return self._find(Path(resume))
        newest = self.latest_valid()
        if newest is None and steps:
            raise UserError(
                f"all {len(steps)} checkpoint(s) in {self.dir} are damaged: remove them or choose another "
                "run.dir to start afresh"
            )
        return newest

    def load(self, path: Path, tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
        """Fill ``tensors`` in place from the checkpoint at ``path``, whatever layout saved it; returns extra.

        Names must match exactly, in both directions, among those that start with ``prefix``. Raises one
        UserError naming the damaged file, or up to ten missing, unknown or differently shaped tensors; nothing
        has been changed then.
        """
        self.wait()
        path = Path(path)
        if path not in self._verified:
            self._require_intact(path)
        return _load(path, tensors, prefix, self._peers)

    def set_aside_after(self, step: int) -> list[Path]:
        """Move the checkpoints newer than ``step`` to ``dir/abandoned``; returns where they are now.

        For a run that goes on from an older checkpoint: otherwise the next resume would jump back to the
        abandoned steps. An earlier abandoned checkpoint of the same step is replaced.
        """
        self.wait()
        self._verified.clear()
        return self._peers.from_first(lambda: self._set_aside_after(step))

    def _set_aside_after(self, step: int) -> list[Path]:
        moved = []
        try:
            for newer in (s for s in _steps(self.dir) if s > step):
                target = self.dir / ASIDE / self.path(newer).name
                target.parent.mkdir(exist_ok=True)
                remove_folder(target)
                os.replace(self.path(newer), target)
                moved.append(target)
        except OSError as error:
            raise UserError(f"checkpoints in {self.dir} cannot be set aside: {error.strerror}") from error
        return moved

    def _find(self, path: Path) -> Path:
        if self._peers.from_first(lambda: (path / CHECKPOINTS).is_dir()):
            return _newest(path / CHECKPOINTS, self._peers)
        self._require_intact(path)
        return path

    def _require_intact(self, path: Path) -> None:
        problems = self._verify(path)
        if problems:
            raise _damaged(path, problems)

    def _verify(self, path: Path) -> list[str]:
        problems = _verify(path, self._peers)
        if not problems:
            self._verified.add(path)
        return problems

    def _clean(self) -> None:
        """Make the folder and remove what a killed run left half-written."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            for leftover in self.dir.glob(f"{TEMPORARY}*"):
                remove_folder(leftover)
        except OSError as error:
            raise UserError(
                f"the checkpoint folder {self.dir} cannot be prepared: {error.strerror} ({error.filename})"
            ) from error

    def _prune(self, step: int) -> None:
        """Remove checkpoints older than the newest ``keep_last`` whole ones that are not newer than ``step``."""
        try:
            older = [s for s in reversed(_steps(self.dir)) if s <= step]
            whole = [s for s in older if not verify(self.path(s), hashes=False)]
            for surplus in (s for s in older if len(whole) > self._keep_last and s <= whole[self._keep_last]):
                remove_folder(self.path(surplus))
        except OSError as error:
            log.warning("an old checkpoint in %s could not be removed: %s", self.dir, error)

    @contextlib.contextmanager
    def _saving(self, writer: JsonWriter, step: int, nbytes: int) -> Iterator[None]:
        try:
            with raising_peer_lost(f"saving the checkpoint of step {step}"):
                yield
        except CheckpointException as error:
            if self._peers.rank == 0:
                with contextlib.suppress(OSError):
                    remove_folder(writer.temporary)
            raise _save_error(error, self.path(step), nbytes) from error


def load_checkpoint(path: Path, tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """:meth:`Checkpointer.load` for a reader: ``path`` is a checkpoint or a run folder (its newest valid one).

    Writes nothing, so that it may look into the folder of a running training. Collective like all here.
    """
    peers = Peers(None, background=False)
    return _load(find_checkpoint(path), tensors, prefix, peers)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself if intact, or a run folder's newest valid one."""
    peers = Peers(None, background=False)
    path = Path(path)
    for folder in (path / CHECKPOINTS, path):
        if peers.from_first(lambda folder=folder: bool(_steps(folder))):  # type: ignore[misc]
            return _newest(folder, peers)
    problems = _verify(path, peers)
    if problems:
        raise _damaged(path, problems)
    return path


def read_extra(path: Path) -> dict[str, Any]:
    """``extra`` of the checkpoint folder ``path``, without a check of its hashes."""
    try:
        return cast(dict[str, Any], json.loads((path / EXTRA).read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path / EXTRA} cannot be read: {error}") from error
