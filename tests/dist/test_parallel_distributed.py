"""Starting from torchrun's variables, the small collectives, and the layouts that are refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moetrain.errors import UserError
from moetrain.parallel import distributed
from moetrain.parallel.mesh import build_meshes
from moetrain.parallel.options import ParallelConfig
from moetrain.parallel.ranks import RankError, run_ranks


def from_the_environment(rank: int, world: int) -> list[object]:
    before = (distributed.rank(), distributed.world())
    distributed.init_from_env(timeout=30)
    distributed.init_from_env(timeout=30)  # joining twice is harmless
    result = [before, distributed.rank(), distributed.world(), distributed.is_main(), dist.get_backend()]
    distributed.barrier()
    distributed.shutdown()
    distributed.shutdown()
    return [*result, dist.is_initialized()]


def test_ranks_join_from_torchruns_variables_and_leave():
    results = run_ranks(from_the_environment, 2, init=False)
    assert results == [[(0, 1), rank, 2, rank == 0, "gloo", False] for rank in range(2)]


@pytest.mark.slow  # tests/launch starts the trainer by torchrun in every run
def test_torchrun_itself_starts_the_ranks(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from moetrain.parallel import distributed as d\n"
        "d.init_from_env(60)\n"
        "t = torch.tensor([d.rank() + 1.0])\n"
        "d.all_reduce_sum_(t)\n"
        "line = f'sum {d.local_rank() < d.local_world()} {t.item()}'\n"
        "open(f'{__file__}.{d.rank()}', 'w').write(line)  # two ranks' lines may mix on one standard output\n"
        "d.shutdown()\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert [Path(f"{script}.{rank}").read_text() for rank in range(2)] == ["sum True 3.0"] * 2


def collectives(rank: int, world: int) -> dict[str, object]:
    a = torch.full((3, 2), float(rank + 1))
    b = torch.tensor([rank, 10], dtype=torch.int64)
    c = torch.full((2,), 0.5 + rank)
    transposed = torch.arange(6.0).view(2, 3).T * (rank + 1)
    distributed.all_reduce_sum_(a, b, c, transposed)
    result: dict[str, object] = {"a": a, "b": b, "c": c, "transposed": transposed}
    result["object"] = distributed.broadcast_object({"name": f"run-{rank}", "pair": (1, 2)})
    result["text"] = distributed.broadcast_object(f"from {rank}", src=1)
    result["empty"] = distributed.broadcast_object("" if rank == 0 else "no")
    try:
        distributed.broadcast_object(torch.zeros(1) if rank == 0 else None)
    except (TypeError, RuntimeError) as error:
        result["refused"] = type(error).__name__
    return result


def test_sums_and_objects_are_the_same_on_every_rank():
    for rank, result in enumerate(run_ranks(collectives, 3)):
        assert torch.equal(result["a"], torch.full((3, 2), 6.0))
        assert torch.equal(result["b"], torch.tensor([3, 30]))
        assert torch.equal(result["c"], torch.full((2,), 4.5))
        assert torch.equal(result["transposed"], torch.arange(6.0).view(2, 3).T * 6)
        assert result["object"] == {"name": "run-0", "pair": [1, 2]}
        assert result["text"] == "from 1"
        assert result["empty"] == ""
        assert result["refused"] == ("TypeError" if rank == 0 else "RuntimeError")


def test_one_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    distributed.init_from_env()
    assert not dist.is_initialized()
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    value = torch.ones(2)
    distributed.all_reduce_sum_(value)
    distributed.barrier()
    distributed.shutdown()
    assert torch.equal(value, torch.ones(2))
    assert distributed.broadcast_object({"pair": (1, 2)}) == {"pair": [1, 2]}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT unset"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a whole number"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "RANK=2 does not lie below WORLD_SIZE=2",
        ),
    ],
)
def test_a_broken_environment_is_one_line(monkeypatch, variables, message):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed.init_from_env()


def join_alone(rank: int, world: int) -> str:
    if rank == 1:
        time.sleep(2.5)
        return "late"
    try:
        distributed.init_from_env(timeout=1)
    except UserError as error:
        return str(error)
    return "joined"


def test_a_rank_whose_peers_never_come_says_so_in_time():
    text = run_ranks(join_alone, 2, init=False, timeout=30)[0]
    assert text.startswith("rank 0 of 2 could not join the others at 127.0.0.1:")
    assert "within 1 s: rank(s) 1 did not come; start all 2 ranks" in text
    assert "\n" not in text


def layouts(rank: int, world: int) -> list[object]:
    result: list[object] = []
    for cfg in (ParallelConfig(), ParallelConfig(dp_replicate=2), ParallelConfig(dp_replicate=4, dp_shard=1)):
        meshes = build_meshes(cfg, world)
        names = meshes.dense.mesh_dim_names
        result.append((names, tuple(meshes.dense.shape), tuple(meshes.fsdp.shape), meshes.world))
    return result


def test_the_dense_mesh_and_what_fsdp_takes_of_it():
    names = ("dp_replicate", "dp_shard")
    expected = [(names, (1, 4), (4,), 4), (names, (2, 2), (2, 2), 4), (names, (4, 1), (4, 1), 4)]
    assert run_ranks(layouts, 4) == [expected] * 4


def test_one_process_has_no_mesh():
    meshes = build_meshes(ParallelConfig(dp_shard=1), 1)
    assert (meshes.dense, meshes.fsdp, meshes.sparse, meshes.world) == (None, None, None, 1)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (ParallelConfig(dp_replicate=3), "dp_replicate=3 does not divide the 4 ranks"),
        (ParallelConfig(dp_replicate=0), "dp_replicate=0"),
        (ParallelConfig(dp_shard=3), "dp_shard=3 is 3, but this run has 4 ranks"),
        (ParallelConfig(ep=5), r"parallel\.ep=5 .*does not divide its 4"),
    ],
)
def test_an_impossible_layout_names_its_key(cfg, message):
    with pytest.raises(UserError, match=message):
        build_meshes(cfg, 4)


def refuse(rank: int, world: int) -> None:
    build_meshes(ParallelConfig(dp_shard=3), world)


def test_a_users_error_on_a_rank_keeps_its_kind():
    with pytest.raises(RankError) as error:
        run_ranks(refuse, 2)
    assert error.value.kind == "UserError"


@pytest.mark.parametrize(
    ("seen", "visible", "expected"),
    [
        (8, "CUDA_VISIBLE_DEVICES", 3),
        (8, None, 3),
        (1, "CUDA_VISIBLE_DEVICES", 0),
        (1, "ROCR_VISIBLE_DEVICES", 0),
    ],
)
def test_a_rank_s_own_gpu(seen, visible, expected, monkeypatch):
    """All of a node's are seen, or the launcher shows each rank one."""
    for name in distributed._VISIBLE:
        monkeypatch.delenv(name, raising=False)
    if visible:
        monkeypatch.setenv(visible, "5")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    assert distributed._own_gpu() == expected


@pytest.mark.parametrize("seen", [0, 1, 3])
def test_fewer_gpus_than_ranks(seen, monkeypatch):
    for name in distributed._VISIBLE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    with pytest.raises(UserError, match=rf"LOCAL_RANK=3, but {seen} GPU"):
        distributed._own_gpu()
