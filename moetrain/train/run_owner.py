"""Who owns a run folder: one JSON record in a file of its own, renewed every few seconds by its owner.

Every access opens the file anew, since network file systems promise the newest bytes after an opening only.
A record has a fixed size and is written in place: a reader that meets a writer finds the old or the new beat.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

from pydantic import Field

from moetrain.errors import UserError
from moetrain.files import parse_json
from moetrain.parallel.launcher import launcher
from moetrain.parallel.process import TEXT, boot_id, process_runs

RECORD = ".owner.json"
_SIZE = 2048  # bytes
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")  # batch systems' own variables
_Short = Annotated[str, Field(max_length=TEXT)]
_Process = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class Owner:
    """A process that trains. ``boot`` names the start of its machine; ``launcher`` is what started its ranks.

    ``beat`` grows while the process lives.
    """

    host: _Short
    boot: _Short
    pid: _Process
    launcher: _Process | None
    job: _Short | None
    since: _Short
    token: _Short
    beat: _Process = 0

    def __str__(self) -> str:
        if not self.pid:
            return "another process"
        job = "" if self.job is None else f" (job {self.job})"
        return f"process {self.pid} on {self.host} since {self.since}{job}"

    def here(self) -> bool:
        """Whether it was started since this machine was."""
        return self.boot == boot_id()

    def runs_here(self) -> bool:
        """Whether a process of its number runs on this machine; one in another container is not seen."""
        return self.here() and process_runs(self.pid)

    def orphaned(self) -> bool:
        """Whether its launcher is gone, so that it is about to end."""
        if self.launcher is None or not self.here():
            return False
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return int(stat.rpartition(")")[2].split()[1]) != self.launcher


def this_process() -> Owner:
    """This process as an owner, with a token of its own."""
    job = next((os.environ[name] for name in _JOBS if os.environ.get(name)), None)
    return Owner(
        host=socket.gethostname()[:TEXT],
        boot=boot_id(),
        pid=os.getpid(),
        launcher=launcher(),
        job=None if job is None else job[:TEXT],
        since=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        token=secrets.token_hex(16),
    )


def read_owner(folder: Path) -> Owner | None:
    """The record in ``folder``; None where there is none. Raises OSError. A damaged one is of nobody."""
    try:
        descriptor = os.open(folder / RECORD, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        return _parse(os.read(descriptor, _SIZE))
    finally:
        os.close(descriptor)


def write_owner(folder: Path, owner: Owner, new: bool) -> None:
    """Write the record. Raises OSError; with ``new`` FileExistsError where there is one already."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_EXCL if new else 0)
    descriptor = os.open(folder / RECORD, flags, 0o644)
    try:
        os.pwrite(descriptor, _text(owner), 0)
    finally:
        os.close(descriptor)


def renew_owner(folder: Path, owner: Owner) -> bool:
    """Write ``owner``'s new beat where the record is still its own, else return False. Raises OSError."""
    try:
        descriptor = os.open(folder / RECORD, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if _parse(os.pread(descriptor, _SIZE, 0)).token != owner.token:
            return False
        os.pwrite(descriptor, _text(owner), 0)
        return True
    finally:
        os.close(descriptor)


def remove_owner(folder: Path, owner: Owner) -> None:
    """Remove the record where it is still ``owner``'s."""
    with contextlib.suppress(OSError):
        found = read_owner(folder)
        if found is not None and found.token == owner.token:
            (folder / RECORD).unlink()


def _text(owner: Owner) -> bytes:
    text = json.dumps(asdict(owner)).encode()
    return text.ljust(_SIZE - 1) + b"\n"


def _parse(data: bytes) -> Owner:
    try:
        return parse_json(data, Owner, RECORD)
    except UserError:  # its bytes stand for a token, which changes with them
        return Owner("", "", 0, None, None, "", token=hashlib.sha256(data).hexdigest())
