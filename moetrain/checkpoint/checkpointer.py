"""Saving and loading the whole training state under any layout, atomically and with a check for damage.

A checkpoint is the folder ``step_00000100`` (see :mod:`moetrain.checkpoint.format`), written by
torch.distributed.checkpoint (see :mod:`moetrain.checkpoint.write`): tensors keyed by name with global
shapes, so that any number of ranks and any sharding loads what any other saved.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from moetrain.checkpoint.folders import clean_folder, remove_folder
from moetrain.checkpoint.format import dtype_name
from moetrain.checkpoint.manifest import verify
from moetrain.checkpoint.peers import Peers
from moetrain.checkpoint.read import (
    Check,
    fill,
    find_checkpoint,
    newest_valid,
    require_intact,
    step_folder,
    steps_in,
)
from moetrain.checkpoint.write import JsonWriter, save_error, save_planner
from moetrain.errors import UserError
from moetrain.parallel.watchdog.peer_errors import raising_peer_lost

ABANDONED = "abandoned"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Save:
    """One save, finished or under way. ``nbytes``: the size of all its tensors, over all ranks."""

    step: int
    target: Path
    nbytes: int
    writer: JsonWriter


class Checkpointer:
    """The checkpoints of one run, in the folder ``dir``.

    ``keep_last`` (at least 1) newest ones are kept. ``async_save`` copies the state to the CPU and writes in
    a thread: at most one save is under way, and its failure is raised by the next :meth:`save`, :meth:`wait`
    or :meth:`close`. ``hash=False`` records sizes only. ``group``: the ranks that take part, None for all.
    ``guard`` is called by rank 0 around every save and raises where the folder is not this run's any more.

    Every method is collective: all ranks call it, in the same order, and all return the same or all raise.
    UserError is for what the user can mend (a full disk, a damaged checkpoint, another model);
    :class:`PeerLostError` means that a rank is gone. Constructing one removes what a
    killed run left half-written, so only the training of this run may: readers use
    :func:`moetrain.checkpoint.read.load_checkpoint`.
    """

    def __init__(
        self,
        dir: Path,
        keep_last: int = 3,
        async_save: bool = False,
        hash: bool = True,
        group: dist.ProcessGroup | None = None,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last}: at least the newest checkpoint is kept")
        self.dir = Path(dir)
        self.last_saved: int | None = None  # the step of this object's newest completed save
        self._keep_last, self._async, self._hash, self._guard = keep_last, async_save, hash, guard
        self._peers = Peers(group)
        self._pending: tuple[Future[Any], _Save] | None = None
        self._intact: set[Path] = set()
        self._removing = threading.Lock()
        self._peers.from_first(self._clean)

    def save(self, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> Path:
        """Save ``tensors`` (name -> tensor or DTensor, the same names on all ranks) and rank 0's ``extra``.

        ``extra`` is JSON-able with string keys. Replaces a checkpoint of the same step, then removes those
        beyond ``keep_last``. Returns its folder, which with ``async_save`` appears when the writing is done.
        Raises UserError when it cannot be written: the half-written folder is gone, earlier ones are kept.
        """
        self.wait()
        text = json.dumps(extra, indent=1) + "\n"
        for name, tensor in tensors.items():
            if tensor.layout != torch.strided or tensor.is_meta:
                raise TypeError(f"{name}: a checkpoint holds dense tensors with values only")
            dtype_name(tensor.dtype)
        target = step_folder(self.dir, step)
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        done = partial(self._prune, step)
        writer = JsonWriter(target, step, text, self._hash, on_complete=done, guard=self._guard)
        save = _Save(step, target, nbytes, writer)
        arguments: dict[str, Any] = {
            "storage_writer": writer,
            "planner": save_planner(),
            "process_group": self._peers.group,
            "no_dist": self._peers.group is None,
        }
        self._intact.discard(target)
        with self._saving(save):
            if self._async:
                future = cast(Future[Any], dcp_async_save(dict(tensors), **arguments))
                future.add_done_callback(lambda done: self._discard(save) if done.exception() else None)
                self._pending = (future, save)
            else:
                dcp_save(dict(tensors), **arguments)
                self.last_saved = step
        return target

    def wait(self) -> None:
        """Wait until no save is under way; raises the error that made the last one fail."""
        if self._pending is None:
            return
        (future, save), self._pending = self._pending, None
        with self._saving(save):
            future.result()
            self.last_saved = save.step

    def close(self) -> None:
        """Wait for a save under way. Call it before the process group is destroyed."""
        self.wait()

    def latest_valid(self) -> Path | None:
        """The newest checkpoint whose files are complete and match their hashes; None if there is none.

        A damaged one is named in a warning with what is wrong, and passed over.
        """
        self.wait()
        path = newest_valid(self.dir, self._peers)
        if path is not None:
            self._intact.add(path)
        return path

    def resolve(self, resume: str) -> Path | None:
        """The checkpoint that the value of ``resume`` names, or None for a fresh start.

        ``auto``: the newest valid one here, None when there is none at all, and an error when every one is
        damaged, since a fresh start would replace them. ``none``: None, and an error when there are any here.
        Else a path: a checkpoint, which must be intact, or a run folder, whose newest valid one is meant.
        """
        count = len(self._peers.from_first(lambda: steps_in(self.dir)))
        if resume not in ("auto", "none"):
            path = find_checkpoint(Path(resume), self._peers)
            self._intact.add(path)
            return path
        if resume == "none" and count:
            raise UserError(
                f"resume=none, but {self.dir} already holds {count} checkpoint(s): "
                "choose another run.dir, or resume=auto to go on from the newest"
            )
        newest = self.latest_valid()
        if newest is None and count:
            raise UserError(
                f"all {count} checkpoint(s) in {self.dir} are damaged: remove them or choose another run.dir "
                "to start afresh"
            )
        return newest

    def load(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        prefix: str = "",
        check: Check = lambda extra: None,
    ) -> dict[str, Any]:
        """Fill ``tensors`` in place from the checkpoint at ``path``, whatever layout saved it; returns extra.

        Names must match exactly, in both directions, among those that start with ``prefix``. Raises one
        UserError naming the damaged file, or up to ten missing, unknown or differently shaped tensors, or the
        one that ``check`` raises over extra; nothing has been changed then.
        """
        self.wait()
        path = Path(path)
        if path not in self._intact:
            require_intact(path, self._peers)
        return fill(path, tensors, prefix, self._peers, check=check)

    def set_aside_after(self, step: int) -> list[Path]:
        """Move the checkpoints newer than ``step`` to ``dir/abandoned``; returns where they are now.

        For a run that goes on from an older checkpoint: otherwise the next resume would jump back to the
        abandoned steps. An earlier abandoned checkpoint of the same step is replaced.
        """
        self.wait()
        self._intact.clear()
        return self._peers.from_first(lambda: self._set_aside_after(step))

    def _set_aside_after(self, step: int) -> list[Path]:
        moved = []
        try:
            for newer in (s for s in steps_in(self.dir) if s > step):
                target = step_folder(self.dir / ABANDONED, newer)
                target.parent.mkdir(exist_ok=True)
                remove_folder(target)
                os.replace(step_folder(self.dir, newer), target)
                moved.append(target)
        except OSError as error:
            raise UserError(f"checkpoints in {self.dir} cannot be set aside: {error.strerror}") from error
        return moved

    def _clean(self) -> None:
        """Make the folder and remove what a killed run left half-written."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            clean_folder(self.dir)
        except OSError as error:
            raise UserError(
                f"the checkpoint folder {self.dir} cannot be prepared: {error.strerror} ({error.filename})"
            ) from error

    def _prune(self, step: int) -> None:
        """Of the checkpoints up to ``step``, remove those older than the newest ``keep_last`` whole ones."""
        try:
            steps = [s for s in steps_in(self.dir) if s <= step]
            whole = [s for s in steps if not verify(step_folder(self.dir, s), hashes=False)]
            for surplus in (s for s in steps if s < whole[-self._keep_last :][0]):
                remove_folder(step_folder(self.dir, surplus))
        except OSError as error:
            log.warning("an old checkpoint in %s could not be removed: %s", self.dir, error)

    @contextlib.contextmanager
    def _saving(self, save: _Save) -> Iterator[None]:
        try:
            with raising_peer_lost(f"saving the checkpoint of step {save.step}"):
                yield
        except CheckpointException as error:
            self._discard(save)
            if self._peers.rank == 0:
                with contextlib.suppress(OSError):
                    self._guard()  # a folder that is gone or another's explains any failure
            raise save_error(error, save.target, save.nbytes) from error

    def _discard(self, save: _Save) -> None:
        """Remove what was half-written; a failed background save does it too, so the second one waits."""
        if self._peers.rank == 0:
            with self._removing, contextlib.suppress(OSError, UserError):
                self._guard()  # another owner of the folder may be saving there by now
                remove_folder(save.writer.temporary)
