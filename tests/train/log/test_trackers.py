"""Trackers: what they leave on disk is read back with the services' own formats."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from wandb_files import history_of, read_wandb

from moetrain.errors import UserError
from moetrain.train.log.loads import MAX_LAYERS, Loads, shown_layers
from moetrain.train.log.options import JsonlTracker, TensorboardTracker, TrackerConfig, WandbTracker
from moetrain.train.log.rules import need
from moetrain.train.log.tracker import NoTracker, Tracker
from moetrain.train.log.trackers import TRACKERS, build_tracker
from moetrain.train.log.wandb_run import WANDB_ID_FILE

ROWS = [
    {"step": s, "train/loss": 8.0 / s, "moe/1/max_load": 1.5, "time": 1e9, "note": None} for s in (1, 2, 3)
]


def use(tracker: Tracker, folder: Path, rows: list[dict[str, Any]], step: int = 0, ok: bool = True) -> None:
    tracker.start(folder, {"model": {"d_model": 32}, "list": [1, 2]}, step)
    for row in rows:
        tracker.log(row, row["step"])
    tracker.finish(ok)


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_jsonl_adds_nothing(tmp_path: Path) -> None:
    use(build_tracker(JsonlTracker()), tmp_path, ROWS)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_events_read_back(tmp_path: Path) -> None:
    use(build_tracker(TensorboardTracker()), tmp_path, [*ROWS, {"step": 4, "train/loss": math.nan}])
    scalars = read_events(tmp_path / "tensorboard")
    assert scalars["moe/1/max_load"] == [(s, 1.5) for s in (1, 2, 3)]
    assert scalars["train/loss"][:3] == [(1, 8.0), (2, 4.0), (3, pytest.approx(8 / 3))]
    assert math.isnan(scalars["train/loss"][3][1])
    assert "note" not in scalars


def test_a_resumed_runs_tensorboard_replaces_what_is_redone(tmp_path: Path) -> None:
    use(build_tracker(TensorboardTracker()), tmp_path, ROWS)
    again = [{"step": s, "train/loss": 7.0} for s in (2, 3, 4)]
    use(build_tracker(TensorboardTracker()), tmp_path, again, step=1)
    loss = read_events(tmp_path / "tensorboard")["train/loss"]
    assert loss == [(1, 8.0), (2, 7.0), (3, 7.0), (4, 7.0)]


def test_tensorboard_of_a_run_begun_anew_replaces_it_all(tmp_path: Path) -> None:
    use(build_tracker(TensorboardTracker()), tmp_path, ROWS)
    use(build_tracker(TensorboardTracker()), tmp_path, [{"step": 1, "train/loss": 7.0}])
    assert read_events(tmp_path / "tensorboard")["train/loss"] == [(1, 7.0)]


def test_tensorboard_has_a_step_once_after_a_rollback(tmp_path: Path) -> None:
    rows = [*ROWS, {"step": 2, "val/loss": 1.0}, *ROWS[1:], {"step": 2, "val/loss": 1.0}]
    use(build_tracker(TensorboardTracker()), tmp_path, rows)
    scalars = read_events(tmp_path / "tensorboard")
    assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3]
    assert scalars["val/loss"] == [(2, 1.0)]


def test_tensorboard_has_the_first_evaluation_once(tmp_path: Path) -> None:
    """Of a run begun anew its own; a resumed one keeps it."""
    rows = [{"step": 0, "val/loss": 9.0}, *ROWS, {"step": 3, "val/loss": 3.0}]
    for loss in (9.0, 8.0):
        use(build_tracker(TensorboardTracker()), tmp_path, [{"step": 0, "val/loss": loss}, *rows[1:]])
    use(build_tracker(TensorboardTracker()), tmp_path, rows[3:], step=2)
    assert read_events(tmp_path / "tensorboard")["val/loss"] == [(0, 8.0), (3, 3.0)]


def test_only_rank_0_writes(tmp_path: Path) -> None:
    use(build_tracker(TensorboardTracker(), rank=1), tmp_path, ROWS)
    assert list(tmp_path.iterdir()) == []


SECRET, ARGUMENT = "hunter2-in-the-environment", "--password=hunter2-on-the-command-line"
_SCRIPT = """
import json, logging, sys
from pathlib import Path
from moetrain.train.log.options import WandbMode, WandbTracker
from moetrain.errors import UserError
from moetrain.train.log.trackers import build_tracker

folder, rows = json.loads(sys.argv[1])
rows.append({**rows[-1], "step": 4})
logging.basicConfig(level=logging.INFO)
for done, ok, lr in ((0, False, 1.0), (1, True, 1.0), (1, True, 2.0)):
    tracker = build_tracker(WandbTracker(tags=["a"]))
    config = {"model": {"d_model": 32}, "optim": {"lr": lr}, "train": {"steps": 3 + ok}}
    tracker.start(Path(folder), config, done)
    for row in rows[done : 3 + ok]:
        tracker.alert("collapse", f"of step {row['step']}", row["step"])
        loads = {layer: [1 / 128] * 128 for layer in range(64)} if row["step"] % 2 else None
        tracker.log(row, row["step"], loads)
    tracker.finish(ok)
try:
    build_tracker(WandbTracker(mode=WandbMode.online)).start(Path(folder), {})
except UserError as error:
    print("error:", error)
"""


@dataclass(frozen=True)
class WandbRun:
    folder: Path
    output: str
    errors: str

    def files(self) -> list[Path]:
        """In the order in which they were begun."""
        return sorted(self.folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="module")
def wandb_run(tmp_path_factory: pytest.TempPathFactory) -> WandbRun:
    """Inside a git repository: a run tracked offline that failed, resumed from step 1, then put online
    without a login (towards a port that nobody serves)."""
    root = tmp_path_factory.mktemp("repository")
    folder = root / "demo"
    folder.mkdir()
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "remote", "add", "origin", "https://example.invalid/secret.git"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"PLANTED_TOKEN": SECRET, "HOME": str(root), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps([str(folder), ROWS]), ARGUMENT],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=200,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return WandbRun(folder, done.stdout, done.stderr)


def test_wandb_offline_run_reads_back(wandb_run: WandbRun) -> None:
    records = [list(read_wandb(path)) for path in wandb_run.files()]
    assert len(records) == 3
    history, resumed, other = (history_of(part) for part in records)
    assert [json.loads(h["train/loss"]) for h in history] == [8.0, 4.0, pytest.approx(8 / 3)]
    assert [json.loads(h["step"]) for h in history] == [1, 2, 3]
    assert [json.loads(h["step"]) for h in resumed] == [4]  # steps 2 and 3 are there, and equal
    assert [json.loads(h["step"]) for h in other] == [2, 3, 4]  # with another config, under another id
    assert "note" not in history[0]
    run = next(r.run for r in records[0] if r.HasField("run"))
    assert run.project == "moetrain"
    assert run.display_name == "demo"
    assert list(run.tags) == ["a"]
    config = {u.key: u.value_json for u in run.config.update}
    assert json.loads(config["model"]) == {"d_model": 32}
    assert [next(r.exit.exit_code for r in rs if r.HasField("exit")) for rs in records] == [1, 0, 0]


def test_wandb_resumes_under_the_id_in_the_run_folder(wandb_run: WandbRun) -> None:
    """And under a new one where steps are done again with another config."""
    kept = (wandb_run.folder / WANDB_ID_FILE).read_text().strip()
    ids = [next(r.run.run_id for r in read_wandb(path) if r.HasField("run")) for path in wandb_run.files()]
    assert ids[0] == ids[1]
    assert ids[2] == kept != ids[0]
    assert f"steps 2 to 4 are in the run {ids[0]} with another config" in wandb_run.errors
    assert f"the run {ids[0]} has the rows up to step 3 already" in wandb_run.errors


def test_wandb_carries_no_code_and_no_git_state(wandb_run: WandbRun) -> None:
    left = [p for p in (wandb_run.folder / "wandb").rglob("*") if p.suffix in (".py", ".patch", ".diff")]
    assert left == []
    assert all(b"secret.git" not in path.read_bytes() for path in wandb_run.files())


def test_wandb_carries_no_environment_command_line_or_host(wandb_run: WandbRun) -> None:
    files = [path for path in (wandb_run.folder / "wandb").rglob("*") if path.is_file()]
    assert files
    for planted in (SECRET, ARGUMENT):
        assert [path for path in files if planted.encode() in path.read_bytes()] == []
    assert not list((wandb_run.folder / "wandb").rglob("wandb-metadata.json"))
    assert not list((wandb_run.folder / "wandb").rglob("requirements.txt"))


def test_wandb_has_a_bounded_number_of_keys_and_an_alert_once(wandb_run: WandbRun) -> None:
    """64 layers of 128 experts: 16 histograms and one map, in every second row."""
    records = [list(read_wandb(path)) for path in wandb_run.files()]
    first, second = (
        {"/".join(key.split("/")[:2]) for key in row if key.startswith("load/")}
        for row in history_of(records[0])[:2]
    )
    assert first == {"load/map", *(f"load/layer_{layer}" for layer in shown_layers(range(64)))}
    assert len(first) == 1 + MAX_LAYERS
    assert not second
    alerts = [[record.alert.text for record in part if record.HasField("alert")] for part in records]
    assert alerts == [[f"of step {n}" for n in steps] for steps in ((1, 2, 3), (4,), (2, 3, 4))]


def test_after_a_requeue_wandb_has_one_run_and_every_step_once(wandb_run: WandbRun) -> None:
    """By wandb's own reader of what it would upload."""
    steps: dict[str, list[int]] = {}
    for path in wandb_run.files():
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        records = [json.loads(line) for line in printed.splitlines()]
        (run,) = {record["run"]["run_id"] for record in records if record["type"] == "run"}
        rows = [record["history"]["item"] for record in records if record["type"] == "history"]
        steps.setdefault(run, []).extend(row["step"] for row in rows)
    (once, other) = steps.values()
    assert once == [1, 2, 3, 4]
    assert other == [2, 3, 4]  # with another config


def test_wandb_without_a_login_is_one_line(wandb_run: WandbRun) -> None:
    lines = [line for line in wandb_run.output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "tracker=wandb did not start (tracker.mode=online)" in lines[0]
    assert "tracker.mode=offline" in lines[0]


class _Broken(NoTracker):
    """A tracker whose service is lost after the first row."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None:
        self.calls.append("start")

    def log(self, row: Mapping[str, Any], step: int, loads: Loads | None = None) -> None:
        self.calls.append(f"log {step}")
        if step > 1:
            raise ConnectionResetError("connection lost")

    def finish(self, ok: bool) -> None:
        self.calls.append("finish")


def test_a_tracker_that_fails_in_training_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = _Broken()
    monkeypatch.setitem(TRACKERS, "broken", lambda cfg: broken)
    use(build_tracker(TrackerConfig(name="broken")), tmp_path, ROWS)
    assert broken.calls == ["start", "log 1", "log 2"]
    assert len(caplog.messages) == 1
    assert "tracker=broken failed at step 2" in caplog.messages[0]
    assert "connection lost" in caplog.messages[0]


def test_an_unknown_tracker_is_named_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'mlflow'.*jsonl, tensorboard, wandb"):
        build_tracker(TrackerConfig(name="mlflow"))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("cfg", [TensorboardTracker(), WandbTracker()])
def test_a_missing_package_names_the_extra_on_every_rank(
    cfg: TrackerConfig, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, cfg.name, None)
    with pytest.raises(UserError, match=rf"pip install 'moetrain\[{cfg.name}\]'"):
        build_tracker(cfg, rank)


def test_a_folder_named_wandb_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "absent_service").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="needs the package absent_service"):
        need("absent_service")


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write to"):
        build_tracker(TensorboardTracker()).start(tmp_path, {})
