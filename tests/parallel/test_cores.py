"""How many threads a run takes and how they wait: affinity, quotas, the environment, a busy machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.parallel import cores

QUOTA = cores.cpu_quota  # which the fixture replaces
POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID")


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in POLICIES:
        monkeypatch.setenv(name, "")  # so that whatever the code sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("own", "quota"),
    [
        ("0::/pod/box\n", 1.5),
        ("0::/pod\n", 2.5),
        ("0::/\n", None),
        ("0::/elsewhere\n", None),
        ("4:cpu,cpuacct:/job\n1:name=systemd:/\n", 3.0),
        ("4:memory:/job\n", None),
        ("", None),
        ("nonsense", None),
    ],
)
def test_the_smallest_quota_above_a_process_counts(tmp_path: Path, own: str, quota: float | None) -> None:
    root = tmp_path / "cgroup"
    write(root, cpu__max="max 100000\n")
    write(root / "pod", cpu__max="250000 100000\n")
    write(root / "pod" / "box", cpu__max="150000 100000\n")
    write(root / "cpu,cpuacct" / "job", cpu__cfs_quota_us="300000\n", cpu__cfs_period_us="100000\n")
    write(root / "cpu,cpuacct", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    (tmp_path / "own").write_text(own)
    assert QUOTA(root, tmp_path / "own") == quota


@pytest.mark.parametrize(("quota", "usable"), [(None, 8), (2.0, 2), (1.9, 1), (0.3, 1), (64.0, 8)])
def test_a_quota_lowers_the_cores(monkeypatch: pytest.MonkeyPatch, quota: float | None, usable: int) -> None:
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert cores.usable_cores() == usable


@pytest.mark.parametrize(
    ("environment", "ranks", "threads"),
    [
        ({}, 1, 8),
        ({}, 3, 2),
        ({}, 99, 1),
        ({"OMP_NUM_THREADS": "3"}, 1, 3),
        ({"OMP_NUM_THREADS": "3,2"}, 1, 3),
        ({"OMP_NUM_THREADS": "1"}, 1, 1),
        ({"OMP_NUM_THREADS": "1"}, 4, 1),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 4, 2),
        ({"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x"}, 4, 3),
        ({"OMP_NUM_THREADS": "many"}, 4, 2),
        ({"OMP_NUM_THREADS": "0"}, 4, 2),
    ],
)
def test_threads_follow_the_environment_then_the_cores(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], ranks: int, threads: int
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cores.threads_per_rank(ranks) == threads


@pytest.mark.parametrize(
    ("busy", "ranks", "set_to"),
    [
        (0.0, 1, {"GOMP_SPINCOUNT": "30000"}),
        (0.4, 1, {"GOMP_SPINCOUNT": "30000"}),
        (1.0, 1, {"OMP_WAIT_POLICY": "passive"}),
        (8.0, 4, {"GOMP_SPINCOUNT": "30000"}),
        (8.0, 8, {}),
    ],
)
def test_threads_sleep_where_others_use_the_cores(
    monkeypatch: pytest.MonkeyPatch, busy: float, ranks: int, set_to: dict[str, str]
) -> None:
    monkeypatch.setattr(cores, "busy_cores", lambda _: busy)
    cores.choose_waiting(ranks)
    assert {name: os.environ[name] for name in POLICIES if name in os.environ} == set_to


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_environment_says_of_waiting_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "7")
    monkeypatch.setattr(cores, "busy_cores", lambda _: 8.0)
    cores.choose_waiting(1)
    assert {n: os.environ[n] for n in POLICIES if n in os.environ} == {name: "7"}


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="busy cores are read from Linux's /proc/stat")
def test_a_busy_process_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert cores.busy_cores(1.0) > 0.4
    finally:
        other.kill()
        other.wait()


def test_a_machine_that_does_not_say_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_busy_ticks", lambda: None)
    assert cores.busy_cores(100.0) == 0.0


@pytest.mark.parametrize("command", ["train", "eval", "generate"])
def test_it_is_chosen_before_torch_is_there(command: str) -> None:
    """OpenMP reads the environment when it is loaded, and never again."""
    lines = [
        "import sys, moetrain.cli as cli",
        "cli.choose_waiting = lambda ranks: print(ranks, 'torch' in sys.modules)",
        f"cli.main([{command!r}, '--no-such-option'])",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == ["1 False"], done.stderr
