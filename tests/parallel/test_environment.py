"""Ranks of srun, mpirun and DeepSpeed's launcher, by variables as those set them, become torchrun's."""

from __future__ import annotations

import math
import os

import pytest

from moetrain.parallel import environment

SRUN = {  # as Slurm 22.05 sets them for a task of a step, those that matter
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "30017",
}


@pytest.fixture
def adopted(monkeypatch):
    """Adopt a launcher's variables; returns those of torchrun that are set then."""
    names = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
    )

    def adopt(variables):
        for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_", "MPI_"))]:
            monkeypatch.delenv(name)
        for name in names:
            monkeypatch.setenv(name, "")  # so that what is set now is undone after the test
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        environment.adopt_launcher()
        return {name: os.environ[name] for name in names if name in os.environ}

    return adopt


def test_a_task_of_srun(adopted):
    assert adopted(SRUN) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "15017",
    }
    assert environment.grace_seconds() == math.inf


def test_cores_of_a_task_are_its_own(adopted):
    assert adopted({**SRUN, "SLURM_CPUS_PER_TASK": "5"})["OMP_NUM_THREADS"] == "5"


def test_what_is_set_already_stays(adopted):
    assert adopted({**SRUN, "MASTER_ADDR": "n1", "MASTER_PORT": "9"}).items() >= {
        ("MASTER_ADDR", "n1"),
        ("MASTER_PORT", "9"),
    }
    torchrun = {"RANK": "1", "WORLD_SIZE": "2"}
    assert adopted({**SRUN, **torchrun}) == torchrun


@pytest.mark.parametrize("without", ["SLURM_STEP_ID", "SLURM_PROCID"])
def test_a_batch_script_is_no_rank(without, adopted):
    assert adopted({name: value for name, value in SRUN.items() if name != without}) == {}


def test_a_shell_of_one_task_is_no_rank(adopted):
    assert adopted({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) == {}


@pytest.mark.parametrize("names", environment._MPI)
def test_a_rank_of_mpirun(names, adopted):
    found = adopted(dict(zip(names, ("5", "8", "1", "4"), strict=True)))
    assert found == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_deepspeeds_launcher_names_the_ranks_of_a_node_otherwise(adopted):
    variables = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    assert adopted(variables)["LOCAL_WORLD_SIZE"] == "2"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu-[007,009-011],login", "gpu-007"),
        ("login,gpu[1-2]", "login"),
        ("rack[1-2]n[04-07]", "rack1n04"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes, first):
    assert environment.first_node(nodes) == first


@pytest.mark.parametrize(("node", "tasks"), [("0", "4"), ("2", "4"), ("3", "2"), ("4", "1"), ("x", "1")])
def test_the_tasks_of_a_node(node, tasks):
    assert environment.tasks_of_node("4(x3),2", node) == tasks
