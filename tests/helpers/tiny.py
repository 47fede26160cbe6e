"""A model and a corpus so small that a run takes about a second, and questions to ask of its run folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.checkpoint.format import decode_metadata
from moetrain.checkpoint.manifest import FileRecord, Manifest, encode_manifest, hash_file, read_manifest
from moetrain.checkpoint.read import load_checkpoint
from moetrain.cli import main
from moetrain.parallel.watchdog.rank_record import RANKS
from moetrain.train.log.jsonl import read_metrics

BATCH = 4  # sequences of one optimizer step, in micro-batches of MICRO
MICRO = 2
SEQ = 16
OVERRIDES = [
    "data=local", "data.tokenizer.kind=bytes", f"data.seq_len={SEQ}", "model.d_model=16",
    "model.num_layers=2", "model.num_heads=2", "model.d_ff=24", "model.d_ff_expert=12", "model.num_experts=5",
    f"train.micro_batch_size={MICRO}", f"train.global_batch_tokens={BATCH * SEQ}", "train.threads=1",
    "train.deterministic=true", "train.eval_samples=5", "train.sample_tokens=3", "schedule.warmup_steps=3",
    "schedule.horizon=40", "optim.lr=0.001", "model.init_std=0.02",
]  # fmt: skip
STEPS = 12
TRAINED = [f"train.steps={STEPS}", "checkpoint.every=5", "checkpoint.keep_last=9", "train.eval_every=5"]
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR")
_LAUNCHER += ("MASTER_PORT", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID")
_TIMES = ("time", "tokens_per_second")  # of a row; all other values are a function of the config


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """To train in this process: as the only rank, reports without plots; torch's settings come back after."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    level = logging.getLogger("moetrain").level
    with pytest.MonkeyPatch.context() as patch:
        for name in _LAUNCHER:
            patch.delenv(name, raising=False)
        patch.setattr("moetrain.report.page.has_matplotlib", lambda: False)
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    logging.getLogger("moetrain").setLevel(level)


def write_corpus(folder: Path) -> Path:
    """Text with something to learn in it, in ``folder/text``; 40 documents of about 1 kB."""
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(41)]
    (folder / "text").mkdir(parents=True)
    for number in range(40):
        text = " ".join(draw.choices(words, weights=range(1, 42), k=200))
        (folder / "text" / f"{number:02}.txt").write_text(text)
    return folder


def command(corpus: Path, run: Path, *overrides: str) -> list[str]:
    """The arguments of ``moetrain`` that train the tiny model on ``corpus`` in the run folder ``run``."""
    data = [f"data.path={corpus}/text", f"data.cache_dir={corpus}/cache"]
    return ["train", f"run.dir={run}", *data, *OVERRIDES, *overrides]


def train(corpus: Path, run: Path, *overrides: str) -> int:
    """The exit code of that command, run in this process."""
    return main(command(corpus, run, *overrides))


def steps(run: Path) -> list[dict[str, Any]]:
    """The rows of the optimizer steps, without what depends on the clock."""
    rows = [row for row in read_metrics(run) if "train/loss" in row]
    return [{key: value for key, value in row.items() if key not in _TIMES} for row in rows]


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The rows of the evaluations, likewise."""
    rows = [row for row in read_metrics(run) if "val/loss" in row]
    return [{key: value for key, value in row.items() if key not in _TIMES} for row in rows]


def checkpoints(run: Path) -> list[int]:
    """The steps of the checkpoints, oldest first."""
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The whole tensors of a checkpoint by name, and its extra without times and the config's words."""
    described = decode_metadata((path / "metadata.json").read_text()).state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in described.items()
    }
    extra = load_checkpoint(path, tensors)
    del extra["meter"], extra["identity"]
    return tensors, extra


def sign(path: Path) -> None:
    """Make the manifest of a checkpoint fit what its files hold now, as whoever changed them could."""
    manifest = read_manifest(path)
    records = [
        FileRecord(file.name, (path / file.name).stat().st_size, hash_file(path / file.name))
        for file in manifest.files
    ]
    (path / "manifest.json").write_bytes(encode_manifest(Manifest(manifest.step, tuple(records))))


def assert_same_state(one: Path, other: Path) -> None:
    """Both checkpoints hold the same bits: weights, optimizer, controllers, data position, random state."""
    tensors, extra = contents(one)
    tensors_there, extra_there = contents(other)
    assert tensors.keys() == tensors_there.keys()
    different = [name for name, tensor in tensors.items() if not torch.equal(tensor, tensors_there[name])]
    assert not different
    assert extra == extra_there


def files(folder: Path) -> list[str]:
    """Every file below ``folder``, by relative name; not those in which ranks say what each start does."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(str(path) for path in paths if path.parts[0] != RANKS)


class Process:
    """A command, its output in a file; whatever is left of it is killed at the end of the ``with``.

    It finds no matplotlib: the plots of a report take longer than a tiny run.
    """

    def __init__(self, arguments: list[str], log: Path, **environment: str) -> None:
        env = {key: value for key, value in os.environ.items() if key not in _LAUNCHER}
        here = Path(__file__).parent
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here}:{here.parents[1]}", **environment}
        self._log = log
        stub = log.parent / "without_plots"
        stub.mkdir(exist_ok=True)
        (stub / "matplotlib.py").write_text("raise ImportError('reports take a while with it')\n")
        env["PYTHONPATH"] = f"{stub}:{env['PYTHONPATH']}"
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in the background
            )  # fmt: skip

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self, seconds: float = 120) -> int:
        """The exit code; the output stands in the error where it does not come."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.output()}") from None

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait for ``condition`` while the process lives."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.popen.poll() is None, f"ended with {self.popen.returncode}:\n{self.output()}"
            assert time.monotonic() < deadline, f"did not happen in {seconds} s:\n{self.output()}"
            time.sleep(0.005)

    def kill_all(self) -> None:
        """SIGKILL to every process, torchrun's ranks in their own groups included, and wait for the first."""
        for pid in [self.popen.pid, *descendants(self.popen.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.popen.wait()


def descendants(pid: int) -> list[int]:
    """Every process that descends from ``pid``; a parent comes before its children."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def rows_written(run: Path) -> int:
    """Whole lines of ``metrics.jsonl`` so far."""
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def started(corpus: Path, run: Path, *overrides: str, ranks: int = 1, **environment: str) -> Process:
    """The same command in a process of its own, or under torchrun with ``ranks`` processes."""
    run.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    arguments = [*launcher, "-m", "moetrain", *command(corpus, run, *overrides)]
    return Process(arguments, run.with_name(f"{run.name}.log"), **environment)


def summary(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return loaded
