"""The folder of one run: its config, where it ran, its rows of numbers, and the places for the rest."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue

import moetrain
from moetrain.errors import UserError
from moetrain.files import MB, read_json
from moetrain.ops.cpu.libraries import faster
from moetrain.redaction import redacted
from moetrain.train.log.jsonl import JsonlFile
from moetrain.train.stopping import STOP_FILE
from moetrain.writing import write_atomic

PLACES = ("checkpoints", "samples")  # folders in it
_EARLIER = 20  # environments of earlier starts that environment.json keeps
_GIT_SECONDS = 10
_PACKAGES = ("numpy", "triton", "datasets", "tokenizers", "safetensors", "transformers", "deepspeed", "wandb")

log = logging.getLogger(__name__)


class RunDir:
    """``path`` with ``checkpoints/`` and ``samples/``, made if missing. All ranks make one; rank 0 writes.

    Raises UserError on every rank when the folder cannot be made or written.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / PLACES[0]
        self.samples = self.path / PLACES[1]
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
        self.alarms = JsonlFile(self.path / "alarms.jsonl", write=rank == 0)

    def write_config(self, text: str) -> None:
        """config.yaml: the composed config."""
        if self._rank == 0:
            write_atomic(self.config_file, text)

    def write_environment(
        self, seed: int, world_size: int, argv: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """environment.json: versions, commit, command, seed, hardware; those of earlier starts too.

        Returns what trackers may know: all of this start's but the command. Rank 0's to do.
        """
        if self._rank != 0:
            return {}
        now = environment(seed, world_size, sys.argv if argv is None else argv)
        told = {key: value for key, value in now.items() if key != "argv"}
        now["earlier"] = self._earlier()[-_EARLIER:]
        write_atomic(self.environment_file, json.dumps(now, indent=1) + "\n")
        return told

    def _earlier(self) -> list[JsonValue]:
        """What environment.json says of earlier starts; a damaged one is begun anew."""
        if not self.environment_file.exists():
            return []
        try:
            before = read_json(self.environment_file, dict[str, JsonValue], MB)
            earlier = before.pop("earlier", [])
            if isinstance(earlier, list):
                return [*earlier, before]
            log.warning("%s: earlier is no list: it is begun anew", self.environment_file)
        except UserError as error:
            log.warning("%s: it is begun anew", error)
        return []

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps: the run goes on after ``step`` steps; -1: it begins, without rows."""
        there = self.metrics.path.exists()
        last = self.metrics.truncate_after(step) or 0
        self.load.truncate_after(step)
        self.alarms.truncate_after(step)
        if self._rank == 0 and there and last < step:
            log.warning("%s has no rows of steps %d to %d", self.metrics.path, last + 1, step)

    def close(self) -> None:
        self.metrics.close()
        self.load.close()
        self.alarms.close()


def new_folder(root: Path) -> tuple[Path, list[Path]]:
    """A new folder in ``root``, named by the clock and, where that is taken, a number; and all it made."""
    made = missing(root)
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count(1):
        path = root / (now if number == 1 else f"{now}_{number}")
        try:
            root.mkdir(parents=True, exist_ok=True)
            path.mkdir()
            return path, [path, *made]
        except FileExistsError as error:
            if not root.is_dir():
                raise cannot_be_used(path, error) from error
        except OSError as error:
            raise cannot_be_used(path, error) from error
    raise AssertionError("unreachable")


def missing(path: Path) -> list[Path]:
    """``path`` and the folders above it that are still to be made, the innermost first."""
    return [folder for folder in (path, *path.parents) if not os.path.exists(folder)]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of ``folders`` that hold nothing, in this order."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def cannot_be_used(path: Path, error: OSError) -> UserError:
    """What is said of a run folder that cannot be made or written."""
    blocked = error.filename or path
    return UserError(
        f"the run folder {path} cannot be used: {error.strerror} ({blocked}); choose another run.dir"
    )


def environment(seed: int, world_size: int, argv: Sequence[str]) -> dict[str, Any]:
    """What a run's numbers depend on besides its config. The host's name and the user's are left out."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "moetrain": moetrain.__version__,
        "git": git_state(Path(moetrain.__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": _versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_products": None if cuda else faster(),
        "cuda_device": cuda,
        "world_size": world_size,
        "seed": seed,
        "argv": [redacted(word) for word in argv],
    }


def _versions() -> dict[str, str]:
    """Of the installed ones among the packages that numbers may depend on."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


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
