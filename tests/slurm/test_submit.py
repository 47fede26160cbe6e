"""What is handed to sbatch, and what is refused before the queue."""

from __future__ import annotations

import shlex

import pytest

from moetrain.slurm import submit

SCRIPTS = ["--scripts", "launch/slurm"]


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert submit.main([*SCRIPTS, "--dry-run", *arguments]) == 0, capsys.readouterr().err
    return shlex.split(capsys.readouterr().out)


def test_what_sbatch_gets(capsys):
    asked = ["--nodes=2", "--gpus-per-node=4", "--cpus-per-rank=7", "--spare-nodes=1", "--time=2:00:00"]
    assert command(capsys, *asked, "--partition=a b", "--", "parallel.ep=8", "run.name=mine") == [
        *("sbatch", "--nodes=3", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=7"),
        *("--partition=a b", "--time=2:00:00", "--signal=B:USR1@300", "launch/slurm/train.sbatch"),
        *("--max-requeues=50", "--spare-nodes=1", "--", "parallel.ep=8", "run.name=mine"),
    ]


def test_a_sweep_is_an_array(capsys):
    words = command(capsys, "--", "-m", "router=topk,relu", "model.d_ff_expert=16,24,32")
    assert words[4:6] == ["--array=0-5", "launch/slurm/sweep.sbatch"]


def test_bad_nodes_are_left_out(capsys, tmp_path):
    (tmp_path / "excluded_nodes").write_text("n7\t2026-01-02\tno disk\nn7\t2026-01-03\tXid\n\n")
    words = command(capsys, "--exclude=n1", "--", f"run.root={tmp_path}")
    assert "--exclude=n1,n7" in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "router=nope"], "router=nope: no such option"),
        (["--nodes=3", "--", "parallel.ep=2"], "parallel.ep=2"),
        (["--nodes=0", "--", "router=topk"], "--nodes 0: at least 1"),
        (["--", "--cfg", "job"], "--cfg prints a page"),
        (["--", "experiment=moe_vs_dense"], "a comparison runs its arms in one process"),
    ],
)
def test_mistakes_cost_no_time_in_the_queue(arguments, message, capsys):
    assert submit.main([*SCRIPTS, "--dry-run", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_container_needs_a_way_to_run_it(capsys, monkeypatch, tmp_path):
    for name, text in {"srun": "--container-image=IMAGE", "apptainer": ""}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{text}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert command(capsys, "--container=an image", "--")[:2] == [
        "MOETRAIN_SRUN=--container-image='an image'",
        "MOETRAIN_RUN=python",
    ]
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    words = command(capsys, "--container=i.sif", "--gpus-per-node=2", "--")
    assert words[0] == "MOETRAIN_RUN=apptainer exec --nv i.sif python"
    (tmp_path / "apptainer").unlink()
    assert submit.main([*SCRIPTS, "--dry-run", "--container=i.sif", "--"]) == 2
    assert "there is no apptainer" in capsys.readouterr().err
