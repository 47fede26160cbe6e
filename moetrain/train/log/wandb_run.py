"""The tracker ``wandb``: one Weights & Biases run for each run folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetrain.errors import UserError
from moetrain.files import read_bytes
from moetrain.terminal import as_text
from moetrain.train.log.loads import Loads, heat_map, histogram, shown_layers
from moetrain.train.log.options import Artifacts, TrackerConfig, WandbTracker
from moetrain.train.log.rules import need
from moetrain.train.log.tracker import numbers
from moetrain.train.log.wandb_rows import LoggedRows
from moetrain.writing import write_atomic

_log = logging.getLogger(__name__)

WANDB_ID_FILE = "wandb_run_id"
_START_SECONDS = 60.0
_FINISH_SECONDS = 120.0  # both less than the thread that calls it is waited for (background.py)


class WandbRun:
    """One Weights & Biases run per run folder, resumed under the id kept in ``<run>/wandb_run_id``.

    Rows go without wandb's own step counter, which refuses to go back: ``step`` is their x axis instead. Rows
    that the run has are not written again; steps done again with another config begin a run of their own.
    Neither code, git state, command line nor host are sent.
    """

    def __init__(self, cfg: TrackerConfig) -> None:
        assert isinstance(cfg, WandbTracker)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._wandb = need("wandb")
        self._cfg = cfg
        self._run: Any = None
        self._rows: LoggedRows | None = None
        self._newest: tuple[Path, int] | None = None  # the checkpoint to upload at the end, and its step
        self._pictures = True

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None:
        self._set_folders(run_dir)
        kept = _kept_id(run_dir)
        rows = LoggedRows(run_dir, kept or secrets.token_hex(4), config)
        run_id = secrets.token_hex(4) if rows.diverge(step) else rows.now.id
        self._init(run_dir, run_id, config)
        write_atomic(run_dir / WANDB_ID_FILE, run_id + "\n")
        self._begin_rows(rows, run_id, step)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _set_folders(self, run_dir: Path) -> None:
        """What wandb keeps lies in the run folder, artifacts under way too."""
        inside = str(run_dir.resolve() / "wandb")
        if os.path.expanduser("~") == "~":  # nobody knows a home folder, where wandb looks for settings
            os.environ["HOME"] = inside
        if self._cfg.artifacts is not Artifacts.none:
            os.environ.setdefault("WANDB_DATA_DIR", inside)
            os.environ.setdefault("WANDB_CACHE_DIR", inside)

    def _init(self, run_dir: Path, run_id: str, config: Mapping[str, Any]) -> None:
        cfg = self._cfg
        settings = self._wandb.Settings(
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            console="off",
            init_timeout=_START_SECONDS,
            finish_timeout=_FINISH_SECONDS,
            x_disable_meta=True,  # the command line, the host's and the user's name
            x_disable_machine_info=True,
            x_save_requirements=False,  # versions are in the config
            x_disable_stats=not cfg.system_metrics,
        )
        try:
            self._run = self._wandb.init(
                project=as_text(cfg.project),
                entity=None if cfg.entity is None else as_text(cfg.entity),
                tags=[as_text(tag) for tag in cfg.tags] or None,
                mode=cfg.mode.value,
                name=as_text(run_dir.resolve().name),
                id=run_id,
                resume="allow",
                dir=str(run_dir),
                config=json.loads(as_text(json.dumps(config, ensure_ascii=False, default=str))),
                settings=settings,
            )
        except Exception as error:  # its own, the network's, pydantic's, or of a user without a home folder
            line = " ".join(str(error).split())
            raise UserError(
                f"tracker=wandb did not start (tracker.mode={cfg.mode.value}): {line}; check the network and "
                "`wandb login`, or take tracker.mode=offline and upload with `wandb sync` later"
            ) from None

    def _begin_rows(self, rows: LoggedRows, run_id: str, step: int) -> None:
        """Say which steps the run has, or why it has another id than before."""
        before = rows.now
        if before.id != run_id:
            _log.warning(
                "tracker=wandb: steps %d to %d are in the run %s with another config: this run goes on as %s",
                min(step + 1, before.train), before.train, before.id, run_id,
            )  # fmt: skip
        elif before.train > step:
            _log.info("tracker=wandb: the run %s has the rows up to step %d already", run_id, before.train)
        rows.begin(run_id)
        self._rows = rows

    def log(self, row: Mapping[str, Any], step: int, loads: Loads | None = None) -> None:
        assert self._rows is not None
        if self._rows.is_new(row, step):
            self._run.log({**numbers(row), **self._media(loads or {}), "step": step})

    def _media(self, loads: Loads) -> dict[str, Any]:
        """A histogram for each of some layers, and one map of all."""
        media = {
            f"load/layer_{layer}": self._wandb.Histogram(np_histogram=histogram(loads[layer]))
            for layer in shown_layers(list(loads))
        }
        if loads and self._pictures:
            try:
                media["load/map"] = self._wandb.Image(heat_map(loads), file_type="png")
            except Exception as error:  # what wandb raises without pillow
                self._pictures = False
                _log.warning("tracker=wandb: no maps of the load (%s): pip install 'moetrain[wandb]'", error)
        return media

    def alert(self, title: str, text: str, step: int) -> None:
        if self._rows is not None and step > self._rows.now.train:  # else it was sent before the resume
            self._run.alert(title=title, text=text, level=self._wandb.AlertLevel.WARN)

    def checkpoint(self, folder: Path, step: int) -> None:
        self._newest = (folder, step)
        if self._cfg.artifacts is Artifacts.all:
            self._upload()

    def _upload(self) -> None:
        """Copies the newest checkpoint; one that was removed meanwhile is named, and the run goes on."""
        if self._newest is None:
            return
        (folder, step), self._newest = self._newest, None
        try:
            artifact = self._wandb.Artifact(f"checkpoint-{self._run.id}", "model", metadata={"step": step})
            artifact.add_dir(str(folder))
            self._run.log_artifact(artifact, aliases=["latest", f"step_{step}"])
        except (OSError, ValueError) as error:
            _log.warning("tracker=wandb: %s was not uploaded: %s", folder, error)

    def finish(self, ok: bool) -> None:
        if self._cfg.artifacts is Artifacts.last:
            self._upload()
        if self._rows is not None:
            self._rows.close()
        self._run.finish(exit_code=0 if ok else 1)

    def abandon(self) -> None:
        """Kill wandb's own process, for which its hook would wait without end when this one exits."""
        for pid in _children("wandb-core"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _children(name: str) -> list[int]:
    """This process's children of that name; none where the system does not tell."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            inside, _, fields = stat.read_text().rpartition(")")
            if int(fields.split()[1]) == os.getpid() and inside.partition("(")[2] == name:
                found.append(int(stat.parent.name))
    return found


def _kept_id(run_dir: Path) -> str | None:
    """The id kept in the run folder, if there is one that wandb would take."""
    path = run_dir / WANDB_ID_FILE
    if not path.exists():
        return None
    kept = read_bytes(path, 1000).decode("utf-8", "replace").strip()
    return kept if re.fullmatch(r"[\w-]{1,64}", kept, re.ASCII) else None
