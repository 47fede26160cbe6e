"""The run folder: made or refused, written whole, and its rows mended after a kill."""

import json
import math
import os
import resource
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moetrain
from moetrain.errors import UserError
from moetrain.train import run_dir
from moetrain.train.log.jsonl import JsonlFile, read_metrics
from moetrain.train.run_dir import RunDir, cpu_model, git_state, new_folder
from moetrain.writing import write_atomic


def test_folders_and_files(tmp_path):
    run = RunDir(tmp_path / "runs" / "a")
    run.write_config("train:\n  steps: 3\n")
    run.metrics.append({"step": 1})
    run.close()
    assert sorted(p.name for p in run.path.iterdir()) == [
        *("checkpoints", "config.yaml", "metrics.jsonl", "samples")
    ]
    assert run.config_file.read_text() == "train:\n  steps: 3\n"
    RunDir(tmp_path / "runs" / "a")  # again, for a resume
    assert run.stop_file == run.path / "STOP"


def test_folders_named_by_the_clock_are_new(tmp_path, monkeypatch):
    class Still:
        @staticmethod
        def now() -> datetime:
            return datetime(2026, 3, 1, 8, 30, 12)

    monkeypatch.setattr(run_dir, "datetime", Still)
    found = [new_folder(tmp_path / "runs") for _ in range(3)]
    names = [path.name for path, _ in found]
    assert [made for _, made in found] == [[found[0][0], tmp_path / "runs"], [found[1][0]], [found[2][0]]]
    assert names == ["2026-03-01_08-30-12", "2026-03-01_08-30-12_2", "2026-03-01_08-30-12_3"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/2026-03-01_08-30-12 cannot be used: "):
        new_folder(tmp_path / "file")


def test_other_ranks_write_nothing(tmp_path):
    run = RunDir(tmp_path, rank=1)
    run.write_config("x")
    run.write_environment(seed=1, world_size=2)
    run.metrics.append({"step": 1})
    run.truncate_after(0)
    run.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "samples"]


@pytest.mark.parametrize("blocked", ["run", "run/checkpoints", "."])
def test_a_file_in_the_way_is_named(tmp_path, blocked):
    root = tmp_path / "root"
    (root / blocked).parent.mkdir(parents=True, exist_ok=True)
    (root / blocked).write_text("mine")
    with pytest.raises(UserError, match=r"the run folder .*root/run cannot be used: ") as error:
        RunDir(root / "run")
    assert "\n" not in str(error.value)
    assert (root / blocked).read_text() == "mine"


@pytest.fixture
def read_only(tmp_path):
    """A folder that even root cannot write."""
    folder = tmp_path / "ro"
    folder.mkdir()
    root = os.geteuid() == 0
    if root and subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)]).returncode:
        pytest.skip("cannot mount a tmpfs here")
    for name in ("checkpoints", "samples"):
        (folder / "made" / name).mkdir(parents=True)
    if root:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield folder
        subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    for path in (folder / "made", folder):
        path.chmod(0o555)
    yield folder
    for path in (folder, folder / "made"):
        path.chmod(0o755)


@pytest.mark.parametrize("name", ["new", "made"])
def test_a_read_only_place_is_refused(read_only, name):
    with pytest.raises(UserError, match=rf"{read_only / name} cannot be used: (Read-only|Permission)"):
        RunDir(read_only / name)


def test_environment(tmp_path):
    run = RunDir(tmp_path)
    run.write_environment(seed=7, world_size=3, argv=["moetrain", "train", "train.seed=7"])
    now = json.loads(run.environment_file.read_text())
    assert now["seed"] == 7
    assert now["world_size"] == 3
    assert now["argv"] == ["moetrain", "train", "train.seed=7"]
    assert now["torch"] == torch.__version__
    assert now["moetrain"] == moetrain.__version__
    assert now["python"] == ".".join(map(str, sys.version_info[:3]))
    assert now["cpu"]
    assert now["earlier"] == []
    assert os.uname().nodename not in run.environment_file.read_text()
    run.write_environment(seed=7, world_size=2, argv=["again"])
    later = json.loads(run.environment_file.read_text())
    assert [e["world_size"] for e in later["earlier"]] == [3]
    assert "earlier" not in later["earlier"][0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"earlier": 3}'])
def test_a_damaged_environment_is_replaced(tmp_path, text):
    run = RunDir(tmp_path)
    run.environment_file.write_text(text)
    run.write_environment(seed=1, world_size=1)
    assert json.loads(run.environment_file.read_text())["earlier"] == []


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.invalid"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    alone = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=alone).stdout.strip()


def test_commit_and_changes_of_the_source_tree(tmp_path, monkeypatch):
    source = tmp_path / "package"
    source.mkdir()
    assert git_state(source) is None
    _git(tmp_path, "init", "-q")
    (tmp_path / "other").write_text("")
    _git(tmp_path, "add", "other")
    assert git_state(source) is None  # nothing committed yet
    _git(tmp_path, "commit", "-q", "-m", "m")
    (source / "__init__.py").write_text("")
    assert git_state(source) is None  # somebody else's repository around an installation
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-q", "-m", "n")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    assert git_state(source) == {"commit": commit, "dirty": False}
    (source / "notes").write_text("untracked")
    assert git_state(source) == {"commit": commit, "dirty": False}
    (source / "__init__.py").write_text("changed")
    assert git_state(source) == {"commit": commit, "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(source) is None  # no git on this machine


def test_the_cpu_has_a_name():
    assert cpu_model().strip()


def test_rows_come_back_exactly(tmp_path):
    rows = [
        {"step": 1, "train/loss": 0.1 + 0.2, "n": 2**60, "ok": True, "text": "ü\n"},
        {"step": 2, "load": [[1, 2], [3.5, 4]], "none": None},
    ]
    file = JsonlFile(tmp_path / "metrics.jsonl")
    for row in rows:
        file.append(row)
    assert read_metrics(tmp_path / "metrics.jsonl") == rows  # before close: nothing waits in a buffer
    file.close()
    assert read_metrics(tmp_path) == rows


def test_numbers_that_json_does_not_know(tmp_path):
    file = JsonlFile(tmp_path / "m.jsonl")
    file.append(
        {"a": math.nan, "b": [math.inf, 1.0], "c": torch.tensor(2.5), "d": np.float32(0.5), "e": np.int64(3)}
    )
    assert file.path.read_text() == '{"a": null, "b": [null, 1.0], "c": 2.5, "d": 0.5, "e": 3}\n'


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_torn_tail_is_mended(tmp_path_factory, data):
    """Cut anywhere, appended to, and read: the whole rows before the cut, then the new one."""
    path = tmp_path_factory.mktemp("m") / "metrics.jsonl"
    rows = [{"step": i, "text": f"é{i}" * i} for i in range(1, 6)]
    text = b"".join((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)
    cut = data.draw(st.integers(0, len(text)))
    path.write_bytes(text[:cut])
    whole = text[: cut + 1].count(b"\n") if cut < len(text) else len(rows)
    assert read_metrics(path) == rows[:whole]
    file = JsonlFile(path)
    file.append({"step": 99})
    file.append({"step": 100})
    file.close()
    assert read_metrics(path) == [*rows[:whole], {"step": 99}, {"step": 100}]


def test_rows_after_the_resumed_step_vanish(tmp_path):
    run = RunDir(tmp_path)
    for step in range(1, 8):
        run.metrics.append({"step": step})
        run.load.append({"step": step, "load": []})
    run.metrics.append({"step": 5, "val/loss": 1.0})
    run.metrics.append({"note": "no step"})
    run.truncate_after(5)
    run.metrics.append({"step": 6, "again": True})
    run.close()
    rows = read_metrics(tmp_path)
    assert [row.get("step") for row in rows] == [1, 2, 3, 4, 5, 5, None, 6]
    assert [row["step"] for row in read_metrics(tmp_path / "load.jsonl")] == [1, 2, 3, 4, 5]
    run.truncate_after(0)
    assert read_metrics(tmp_path / "load.jsonl") == []


def test_truncating_drops_a_torn_tail_too(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    JsonlFile(path).truncate_after(9)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    JsonlFile(tmp_path / "none.jsonl").truncate_after(3)  # nothing to do


@pytest.mark.parametrize("middle", ['{"st', "[1]", "\x00\x00"])
def test_damage_in_the_middle_is_named(tmp_path, middle):
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"step": 1}}\n{middle}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"m.jsonl line 2 is damaged"):
        read_metrics(path)


def test_no_metrics_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be read: No such file"):
        read_metrics(tmp_path)


def test_a_full_disk_leaves_no_part_of_a_row(tmp_path):
    file = JsonlFile(tmp_path / "m.jsonl")
    file.append({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(UserError, match=r"m.jsonl cannot be written: File too large"):
            file.append({"step": 2, "text": "x" * 100})
        with pytest.raises(UserError, match=r"other.txt cannot be written: File too large"):
            write_atomic(tmp_path / "other.txt", "x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.path.read_text() == '{"step": 1}\n'
    file.append({"step": 2})
    assert len(read_metrics(file.path)) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.jsonl"]


def test_rows_survive_a_kill(tmp_path):
    """A process that is killed in the middle of writing leaves whole rows, and the next one goes on."""
    path = tmp_path / "m.jsonl"
    pid = os.fork()
    if pid == 0:
        file = JsonlFile(path)
        for i in range(10**9):
            file.append({"step": i, "text": "x" * 50})
    while not path.exists() or path.stat().st_size < 10_000:
        time.sleep(0.001)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    JsonlFile(path).append({"step": len(rows)})
    assert len(read_metrics(path)) == len(rows) + 1
