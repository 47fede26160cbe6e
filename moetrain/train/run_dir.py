"""The folder of one run: its config, where it ran, its rows of numbers, and the places for the rest."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import torch

import moetrain
from moetrain.errors import UserError
from moetrain.terminal import as_text
from moetrain.train.stopping import STOP_FILE

_EARLIER = 20  # environments of earlier starts that environment.json keeps
_GIT_SECONDS = 10


class RunDir:
    """``path`` with ``checkpoints/`` and ``samples/``, made if missing. All ranks make one; rank 0 writes.

    Raises UserError on every rank when the folder cannot be made or written.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.config_file = self.path / "config.yaml"
        self.environment_file = self.path / "environment.json"
        self.report_file = self.path / "report.html"
        self.stop_file = self.path / STOP_FILE
        self._rank = rank
        try:
            for folder in (self.path, self.checkpoints, self.samples):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):  # a read-only mount shows only now
                pass
        except OSError as error:
            raise cannot_be_used(self.path, error) from error
        self.metrics = JsonlFile(self.path / "metrics.jsonl", write=rank == 0)
        self.load = JsonlFile(self.path / "load.jsonl", write=rank == 0)

    def write_config(self, text: str) -> None:
        """config.yaml: the composed config."""
        if self._rank == 0:
            write_atomic(self.config_file, text)

    def write_environment(self, seed: int, world_size: int, argv: Sequence[str] | None = None) -> None:
        """environment.json: versions, commit, command, seed, hardware; those of earlier starts too."""
        if self._rank != 0:
            return
        now = environment(seed, world_size, sys.argv if argv is None else argv)
        try:
            before = json.loads(self.environment_file.read_text())
            earlier = before.pop("earlier", [])
            now["earlier"] = [*earlier, before][-_EARLIER:]
        except (OSError, ValueError, AttributeError, TypeError):
            now["earlier"] = []
        write_atomic(self.environment_file, json.dumps(now, indent=1) + "\n")

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps: the run goes on after ``step`` steps."""
        self.metrics.truncate_after(step)
        self.load.truncate_after(step)

    def close(self) -> None:
        self.metrics.close()
        self.load.close()


def new_folder(root: Path) -> Path:
    """A new folder in ``root``, named by the clock and, where that name is taken, a number."""
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count(1):
        path = root / (now if number == 1 else f"{now}_{number}")
        try:
            root.mkdir(parents=True, exist_ok=True)
            path.mkdir()
            return path
        except FileExistsError as error:
            if not root.is_dir():
                raise cannot_be_used(path, error) from error
        except OSError as error:
            raise cannot_be_used(path, error) from error
    raise AssertionError("unreachable")


def cannot_be_used(path: Path, error: OSError) -> UserError:
    """What is said of a run folder that cannot be made or written."""
    blocked = error.filename or path
    return UserError(
        f"the run folder {path} cannot be used: {error.strerror} ({blocked}); choose another run.dir"
    )


class JsonlFile:
    """Rows of JSON, one a line, each on disk (in the system's hands) when :meth:`append` returns.

    ``write=False`` makes every method do nothing. The first row appended to an existing file first mends a
    last line that a killed process left unfinished.
    """

    def __init__(self, path: Path, write: bool = True) -> None:
        self.path = path
        self._write = write
        self._file: BinaryIO | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row. A float that is not finite becomes null: JSON has no other word for it.

        Raises UserError when the disk is full or the file cannot be written; no part of the row stays then.
        """
        if not self._write:
            return
        line = (json.dumps(_finite(row), allow_nan=False) + "\n").encode()
        try:
            if self._file is None:
                _mend(self.path)
                self._file = self.path.open("ab", buffering=0)
            start = self._file.seek(0, os.SEEK_END)
            try:
                done = 0
                while done < len(line):
                    done += self._file.write(line[done:])
            except OSError:
                self._file.truncate(start)
                raise
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from error

    def truncate_after(self, step: int) -> None:
        """Keep only rows whose ``step`` is at most ``step``, or without one. Replaces the file whole."""
        if not self._write or not self.path.exists():
            return
        self.close()
        kept = [line for line, row in _rows(self.path) if row.get("step", 0) <= step]
        write_atomic(self.path, "".join(f"{line}\n" for line in kept))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file (or of ``metrics.jsonl`` in a run folder), in order.

    An unfinished last line is left out. Raises UserError if there is no such file or another line is damaged.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    return [row for _, row in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line without its end, and the row it holds; an unfinished last line is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                return
            raise UserError(f"{path} line {number} is damaged ({error}): remove that line") from error
        yield line.decode(), row


def _mend(path: Path) -> None:
    """End an unfinished last line, or cut it off when it is not a whole row."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        data = file.read()
        if not data or data.endswith(b"\n"):
            return
        start = data.rfind(b"\n") + 1
        try:
            json.loads(data[start:])
            file.write(b"\n")
        except ValueError:
            file.truncate(start)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return _finite(value.item()) if hasattr(value, "item") else value


def write_atomic(path: Path, text: str) -> None:
    """Write a whole file under a temporary name, fsync it and rename it. Raises UserError if that fails."""
    temporary = path.with_name(f".tmp_{path.name}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(as_text(text))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def environment(seed: int, world_size: int, argv: Sequence[str]) -> dict[str, Any]:
    """What a run's numbers depend on besides its config. The host's name and the user's are left out."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "moetrain": moetrain.__version__,
        "git": git_state(Path(moetrain.__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_threads": torch.get_num_threads(),
        "cuda_device": cuda,
        "world_size": world_size,
        "seed": seed,
        "argv": list(argv),
    }


def git_state(source: Path) -> dict[str, Any] | None:
    """Commit of the tree that tracks ``source``, and whether tracked files differ from it; else None."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(source), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=_GIT_SECONDS,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not some other repository around an installation
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"commit": git("rev-parse", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
