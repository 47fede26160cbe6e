"""Finding, checking and loading checkpoints; nothing here writes.

Everything is collective over ``peers``: the ranks share the hashing between them, and all of them return the
same or raise the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.storage import StorageReader

from moetrain.checkpoint.blocks import BlockError, check_places
from moetrain.checkpoint.format import (
    EXTRA,
    FOLDER_NAME,
    METADATA,
    VERSION,
    FormatError,
    decode_metadata,
    dtype_name,
    read_file,
    stored_blocks,
)
from moetrain.checkpoint.json_reader import JsonReader, load_planner
from moetrain.checkpoint.manifest import other_version, read_manifest, verify
from moetrain.checkpoint.peers import Peers
from moetrain.checkpoint.write import one_line, raise_interrupt
from moetrain.errors import UserError
from moetrain.files import MB, read_json
from moetrain.parallel.watchdog.peer_errors import raising_peer_lost

CHECKPOINTS = "checkpoints"  # the folder's name inside a run folder
_LISTED = 10  # names in one message
_EXTRA_LIMIT = 64 * MB
Check = Callable[[dict[str, Any]], object]

log = logging.getLogger(__name__)


def step_folder(folder: Path, step: int) -> Path:
    """The path of the checkpoint after ``step`` optimizer steps, in ``folder``, the run's checkpoints."""
    return folder / f"step_{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in ``folder``, oldest first, damaged ones included."""
    try:
        names = [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"the checkpoint folder {folder} cannot be read: {error.strerror}") from error
    return sorted(int(match[1]) for name in names if (match := FOLDER_NAME.fullmatch(name)))


def problems_of(path: Path, peers: Peers) -> list[str]:
    """The faults of the checkpoint at ``path``, one line per file, the same on every rank.

    Raises UserError for one that is of another version of the format.
    """
    version = peers.from_first(lambda: other_version(path))
    if version is not None:
        raise UserError(
            f"checkpoint {path} is of format version {version}, and this moetrain reads version {VERSION}: "
            "go on with the moetrain that wrote it, which environment.json in the run's folder names"
        )
    found = [problem for share in peers.gather(verify(path, peers.rank, peers.world)) for problem in share]
    return list(dict.fromkeys(found))


def require_intact(path: Path, peers: Peers) -> None:
    """Raises UserError naming the first damaged files of the checkpoint at ``path``."""
    if not peers.from_first(path.is_dir):
        raise UserError(f"there is no checkpoint at {path}")
    problems = problems_of(path, peers)
    if problems:
        raise UserError(f"checkpoint {path} is damaged or incomplete: {listing(problems, '; ')}")


def newest_valid(folder: Path, peers: Peers) -> Path | None:
    """The newest intact checkpoint in ``folder``; a damaged one is named in a warning and passed over."""
    for step in reversed(peers.from_first(lambda: steps_in(folder))):
        path = step_folder(folder, step)
        problems = problems_of(path, peers)
        if not problems:
            return path
        if peers.rank == 0:
            log.warning("checkpoint %s is damaged and is passed over: %s", path, listing(problems, "; "))
    return None


def find_checkpoint(path: Path, peers: Peers | None = None) -> Path:
    """The intact checkpoint at ``path``: itself, or the newest valid one of a run folder.

    Raises UserError when there is none or it is damaged.
    """
    peers = Peers() if peers is None else peers
    path = Path(path)
    for folder in (path / CHECKPOINTS, path):
        count = len(peers.from_first(lambda folder=folder: steps_in(folder)))  # type: ignore[misc]
        if count:
            newest = newest_valid(folder, peers)
            if newest is None:
                raise UserError(f"all {count} checkpoint(s) in {folder} are damaged")
            return newest
    require_intact(path, peers)
    return path


def run_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint lies in."""
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else checkpoint.parent


def load_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], prefix: str = "", cast: bool = False
) -> dict[str, Any]:
    """Find the checkpoint at ``path`` (:func:`find_checkpoint`) and :func:`fill` ``tensors`` from it.

    Returns its extra. ``cast``: stored values may have another dtype, and are cast to that of ``tensors``.
    Writes nothing, so ``path`` may be the folder of a run that still trains.
    """
    peers = Peers()
    return fill(find_checkpoint(path, peers), tensors, prefix, peers, cast)


def read_extra(path: Path) -> dict[str, Any]:
    """The extra of a checkpoint: everything that is not a tensor."""
    extra: dict[str, Any] = read_json(path / EXTRA, dict[str, JsonValue], _EXTRA_LIMIT)
    return extra


def fill(
    path: Path,
    tensors: Mapping[str, Tensor],
    prefix: str,
    peers: Peers,
    cast: bool = False,
    check: Check = lambda extra: None,
    without: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Fill ``tensors`` in place from the intact checkpoint ``path``; returns its extra.

    Only names that start with ``prefix`` count, less those that start with one of ``without``, and among them
    the two sides must agree in names, global
    shapes and, without ``cast``, dtypes; else one UserError lists what differs and nothing has been changed.
    So it is where ``check``, which is shown the extra first, raises UserError.
    """

    def checked() -> dict[str, Any]:
        extra = read_extra(path)
        check(extra)
        return extra

    metadata, complaint = read_metadata(path)
    peers.raise_together(complaint)
    extra = peers.together(checked)
    fill_from(
        JsonReader(path, metadata), metadata, f"checkpoint {path}", tensors, prefix, peers, cast, without
    )
    return extra


def fill_from(
    reader: StorageReader,
    metadata: Metadata,
    where: str,
    tensors: Mapping[str, Tensor],
    prefix: str,
    peers: Peers,
    cast: bool,
    without: tuple[str, ...] = (),
) -> None:
    """Fill ``tensors`` from ``reader``. ``where``: its name in messages."""
    peers.raise_together(_difference(where, metadata, tensors, prefix, cast, without))
    try:
        with torch.no_grad(), raising_peer_lost(f"loading {where}"):
            dcp_load(
                dict(tensors),
                storage_reader=reader,
                planner=load_planner(),
                process_group=peers.group,
                no_dist=peers.group is None,
            )
    except CheckpointException as error:
        raise_interrupt(error)
        rank, (cause, _) = next(iter(error.failures.items()))
        raise UserError(f"{where} cannot be read: rank {rank}: {one_line(cause)}") from error


def read_metadata(path: Path) -> tuple[Metadata, str | None]:
    """A checkpoint's metadata, with each block inside a file of the manifest; else an error message."""
    try:
        metadata = decode_metadata(read_file(path, METADATA))
        check_places(stored_blocks(metadata), {file.name: file.size for file in read_manifest(path).files})
        return metadata, None
    except (FormatError, BlockError) as error:
        return Metadata({}), f"checkpoint {path} cannot be read: {METADATA}: {error}"


def _difference(
    where: str,
    metadata: Metadata,
    tensors: Mapping[str, Tensor],
    prefix: str,
    cast: bool,
    without: tuple[str, ...],
) -> str | None:
    """One line on how the stored names, shapes and dtypes differ from ``tensors``; None if they agree."""
    entries = metadata.state_dict_metadata.items()
    stored: dict[str, Any] = {n: e for n, e in entries if n.startswith(prefix) and not n.startswith(without)}
    complaints = [f"{name} is not in the checkpoint" for name in tensors if name not in stored]
    complaints += [f"{name} is in the checkpoint only" for name in stored if name not in tensors]
    for name, tensor in tensors.items():
        if tensor.is_meta:
            complaints.append(f"{name} is on the meta device: it has no memory to load into")
        elif name in stored:
            dtype = tensor.dtype if cast else stored[name].properties.dtype
            there = _describe(dtype, stored[name].size)
            here = _describe(tensor.dtype, tensor.shape)
            if there != here:
                complaints.append(f"{name} is {there} in the checkpoint and {here} here")
    if not complaints:
        return None
    head = f"{where} is of another model or optimizer: {len(complaints)} difference(s): "
    return head + listing(complaints, "; ")


def _describe(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{dtype_name(dtype)}{list(shape)}"


def listing(items: Sequence[str], separator: str) -> str:
    """At most ten of ``items`` as text, and the number of the others."""
    more = len(items) - _LISTED
    return separator.join([*items[:_LISTED], *([f"and {more} more"] if more > 0 else [])])
