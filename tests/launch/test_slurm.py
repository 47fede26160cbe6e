"""Runs on a real Slurm of three nodes on this machine: whole, over a time limit, cancelled, on bad nodes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_cluster
import tiny
from slurm_cluster import Cluster

from moetrain.checkpoint.manifest import read_manifest
from moetrain.config.hydra.compose import load_yaml

LAUNCH = Path(__file__).parents[2] / "launch" / "slurm"
TWO_BY_TWO = ["--nodes=2", "--ntasks-per-node=2"]
LACKS = slurm_cluster.missing()
pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(LACKS), reason=f"a Slurm of one's own needs {', '.join(LACKS)}"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture
def there(tmp_path: Path, slurm: Cluster) -> Path:
    """The folder from which jobs are submitted; they find moetrain and the tests' plug-ins."""
    here = Path(__file__).parents[1] / "helpers"
    slurm.env |= {"PYTHONPATH": f"{here}:{here.parents[1]}"}
    return tmp_path


def overrides(corpus: Path, *more: str) -> list[str]:
    """Those of the tiny training, without a run folder."""
    return [*tiny.command(corpus, Path("unused"), *tiny.TRAINED)[2:], *more]


def log(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.glob("*.log")))


def until(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def train_here(corpus: Path, run: Path, *more: str) -> None:
    """The same run without Slurm, on as many ranks."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m", "moetrain"]
    command = [sys.executable, *ranks, *tiny.command(corpus, run, *tiny.TRAINED, *more)]
    with tiny.Process(command, run.parent / "here.txt") as process:
        assert process.wait(200) == 0, process.output()


def test_two_nodes_of_two_ranks_train_to_the_end(slurm, corpus, there):
    """The run folder is named by the job; the same ranks under torchrun give the same rows."""
    job = slurm.sbatch(*TWO_BY_TWO, str(LAUNCH / "train.sbatch"), *overrides(corpus), cwd=there)
    assert slurm.wait(job)["JobState"] == "COMPLETED", log(there)
    run = there / "runs" / f"slurm-{job}"
    assert "preflight: 2 node(s) are well" in log(there)
    assert json.loads((run / "environment.json").read_text())["world_size"] == 4
    train_here(corpus, there / "here")
    assert tiny.steps(run) == tiny.steps(there / "here")


def test_a_time_limit_shorter_than_the_run(slurm, corpus, there):
    """It is warned, saves, goes back into the queue by itself, and ends as if nothing had happened."""
    slow = ["plugins=[faulty_router]", "router=faulty", "router.pace=10"]  # twelve steps pass the limit
    limited = ["--time=2", "--signal=B:USR1@20", *TWO_BY_TWO, str(LAUNCH / "train.sbatch"), "--no-preflight"]
    job = slurm.sbatch(*limited, *overrides(corpus, *slow), cwd=there)
    state = slurm.wait(job, 500)
    assert state["JobState"] == "COMPLETED", log(there)
    assert int(state["Restarts"]) >= 1, log(there)
    assert "warned by SIGUSR1 at step" in log(there)
    run = there / "runs" / f"slurm-{job}"
    train_here(corpus, there / "here", *slow[:2])  # without the pauses
    assert tiny.steps(run) == tiny.steps(there / "here")
    tiny.assert_same_state(tiny.checkpoint(run, tiny.STEPS), tiny.checkpoint(there / "here", tiny.STEPS))


def test_a_cancelled_job_leaves_a_checkpoint_that_loads(slurm, corpus, there):
    slow = ["plugins=[faulty_router]", "router=faulty", "router.pace=1"]
    run = there / "runs" / "mine"
    script = [str(LAUNCH / "train.sbatch"), "--no-preflight"]
    job = slurm.sbatch(*TWO_BY_TWO, *script, *overrides(corpus, "run.name=mine", *slow), cwd=there)
    until(lambda: tiny.checkpoints(run) != [])
    slurm.run("scancel", job)
    assert slurm.wait(job)["JobState"] == "CANCELLED"
    until(lambda: not slurm.run("squeue", "-h", "-j", job, check=False))
    newest = tiny.checkpoints(run)[-1]
    assert 0 < newest < tiny.STEPS
    assert read_manifest(tiny.checkpoint(run, newest)).step == newest
    again = slurm.sbatch(*TWO_BY_TWO, *script, *overrides(corpus, "run.name=mine", *slow), cwd=there)
    assert slurm.wait(again)["JobState"] == "COMPLETED", log(there)
    assert f"{newest} steps done" in log(there)


def test_a_node_that_the_preflight_finds_bad_is_left_out(slurm, corpus, there):
    """A spare one takes its place, and the next submission asks for others."""
    (slurm.root / slurm_cluster.SICK).write_text("n1\n")
    try:
        options = ["--nodes=3", "--ntasks-per-node=1", str(LAUNCH / "train.sbatch"), "--spare-nodes=1"]
        job = slurm.sbatch(*options, *overrides(corpus), cwd=there)
        assert slurm.wait(job)["JobState"] == "COMPLETED", log(there)
    finally:
        (slurm.root / slurm_cluster.SICK).unlink()
    assert "preflight: n1 is left out: Slurm gave 1 GPU(s), and CUDA sees 0" in log(there)
    assert json.loads((there / "runs" / f"slurm-{job}" / "environment.json").read_text())["world_size"] == 2
    assert (there / "runs" / "excluded_nodes").read_text().startswith("n1\t")
    submit = [str(LAUNCH / "submit"), "--dry-run", "--", *overrides(corpus)]
    shown = subprocess.run(submit, cwd=there, env=slurm.env, capture_output=True, text=True)
    assert " --exclude=n1 " in shown.stdout, shown.stderr


def test_two_jobs_at_once_and_a_sweep(slurm, corpus, there):
    """Each job has its own port, folder and router."""
    short = ["train.steps=4", "checkpoint.every=4"]
    submit = [
        str(LAUNCH / "submit"),
        "--ranks-per-node=2",
        "--no-preflight",
        "--",
        *overrides(corpus, *short),
    ]
    sweep = ["-m", "router=topk,expert_choice,relu", "run.name=three"]
    environment = slurm.env | {"PATH": f"{Path(sys.executable).parent}:{slurm.env['PATH']}"}
    shown = subprocess.run([*submit, *sweep], cwd=there, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    array = shown.stdout.split()[-1]
    for task in range(3):
        assert slurm.wait(f"{array}_{task}")["JobState"] == "COMPLETED", log(there)
    files = [there / "runs" / f"three_job{task}" / "config.yaml" for task in range(3)]
    assert [load_yaml(file).router.name for file in files] == ["topk", "expert_choice", "relu"]
    ports = re.findall(r"port (\d+)", log(there))
    assert len(ports) == len(set(ports)) == 3
