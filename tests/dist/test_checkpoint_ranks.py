"""Checkpoints over real ranks: any layout loads any other bit for bit; all ranks refuse alike."""

import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.read import load_checkpoint
from moetrain.checkpoint.state_dict import model_tensors, optimizer_tensors
from moetrain.errors import UserError
from moetrain.parallel.ranks import run_ranks
from moetrain.parallel.watchdog.peer_errors import PeerLostError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Net(nn.Module):
    """Prime sizes: every shard is uneven, and with three ranks some are empty."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, 7)
        self.experts = nn.Parameter(torch.randn(5, 7, 2))
        self.scale = nn.Parameter(torch.randn(1))
        self.register_buffer("counts", torch.arange(11.0))

    def forward(self, x_B3: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bd,edf->bef", self.first(x_B3), self.experts) * self.scale


def build(seed: int, sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Net(seed)
    if sharded:
        fully_shard(model.first)
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    g = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3, generator=g)).square().mean().backward()
        optimizer.step()


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return model_tensors(model) | optimizer_tensors(model, optimizer)


def values(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    """Whole values, by bits."""
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    return {
        n: (str(t.dtype), tuple(t.shape), t.detach().contiguous().numpy().tobytes()) for n, t in whole.items()
    }


def saved_by(rank: int, world: int, folder: str, async_save: bool) -> dict[str, tuple]:
    model, optimizer = build(0, sharded=world > 1)
    train(model, optimizer, 3)
    tensors = state(model, optimizer)
    wanted = values(tensors)
    checkpointer = Checkpointer(Path(folder), async_save=async_save)
    checkpointer.save(3, tensors, {"rank": rank})
    train(model, optimizer, 2)  # its collectives run beside those of the save
    checkpointer.close()
    assert checkpointer.last_saved == 3
    return wanted


def loaded_by(rank: int, world: int, folder: str) -> tuple[dict[str, tuple], dict[str, Any]]:
    model, optimizer = build(1, sharded=world > 1)
    tensors = state(model, optimizer)
    checkpointer = Checkpointer(Path(folder))
    path = checkpointer.latest_valid()
    assert path is not None
    extra = checkpointer.load(path, tensors)
    return values(state(model, optimizer)), extra


@pytest.mark.parametrize(
    ("saving", "loading", "async_save"),
    [
        *((2, 1, False), (2, 2, False), (2, 3, False), (1, 2, False), (3, 2, False)),
        *((2, 1, True), (1, 2, True)),
    ],
)
def test_any_number_of_ranks_loads_what_any_other_saved(tmp_path, saving, loading, async_save):
    run = run_ranks if saving > 1 else lambda fn, world, *args: [fn(0, world, *args)]
    wanted = run(saved_by, saving, str(tmp_path), async_save)
    run = run_ranks if loading > 1 else lambda fn, world, *args: [fn(0, world, *args)]
    for found, extra in run(loaded_by, loading, str(tmp_path)):
        assert extra == {"rank": 0}
        assert found == wanted[0]
    files = sorted(p.name for p in (tmp_path / "step_00000003").iterdir())
    assert files == [
        *(f"__{rank}_0.distcp" for rank in range(saving)),
        *("extra.json", "manifest.json", "metadata.json"),
    ]


def _placements(rank: int, world: int, folder: str, save: bool) -> list[tuple]:
    """Two mesh dimensions, and placements that differ between saving and loading."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    whole = torch.arange(7 * 5 * 3, dtype=torch.float64).reshape(7, 5, 3)
    before = [[Shard(0), Shard(1)], [Replicate(), Shard(2)], [Shard(1), Replicate()], [Shard(0), Shard(0)]]
    after = [[Replicate(), Shard(1)], [Shard(0), Shard(0)], [Shard(2), Shard(0)], [Replicate(), Replicate()]]
    source = whole if save else torch.zeros_like(whole)
    tensors = {
        f"t{i}": distribute_tensor(source.clone(), mesh, p) for i, p in enumerate(before if save else after)
    }
    tensors["scalar"] = distribute_tensor(torch.tensor(3.5 if save else 0.0), mesh, [Replicate()] * 2)
    checkpointer = Checkpointer(Path(folder), async_save=save)
    if save:
        path = checkpointer.save(1, tensors, {})
        tensors["scalar"].to_local().zero_()  # a copy was taken, of this one too
        checkpointer.wait()
        return [str(path)]
    checkpointer.load(Path(folder) / "step_00000001", tensors)
    return [t.full_tensor().equal(whole) for n, t in tensors.items() if n != "scalar"] + [
        float(tensors["scalar"].full_tensor())
    ]


def test_two_dimensional_layouts_change_into_each_other(tmp_path):
    run_ranks(_placements, 4, str(tmp_path), True)
    assert run_ranks(_placements, 4, str(tmp_path), False) == [[True] * 4 + [3.5]] * 4


def _one_cannot_write(rank: int, world: int, folder: str, failing: int, async_save: bool) -> tuple:
    checkpointer = Checkpointer(Path(folder), async_save=async_save)
    tensors = {f"t{i}": torch.full((1000,), float(i)) for i in range(7)}
    checkpointer.save(1, tensors, {})
    checkpointer.wait()
    if rank == failing:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    try:
        checkpointer.save(2, tensors, {})
        checkpointer.wait()
        return "", None
    except UserError as error:
        names = sorted(p.name for p in Path(folder).iterdir())
        dist.barrier()
        return str(error), names, str(checkpointer.latest_valid())


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_disk_that_is_full_for_one_rank_stops_the_save_on_all(tmp_path, failing, async_save):
    results = run_ranks(_one_cannot_write, 2, str(tmp_path), failing, async_save)
    for message, names, newest in results:
        assert (
            f"step_00000002 was not saved: rank {failing}: File too large (__{failing}_0.distcp)" in message
        )
        assert "its tensors take 28,000 bytes" in message
        assert "step_00000001" in names
        assert "step_00000002" not in names
        assert newest.endswith("step_00000001")
    assert os.listdir(tmp_path) == ["step_00000001"]


def _refusals(rank: int, world: int, folder: str) -> list[str]:
    checkpointer = Checkpointer(Path(folder))
    found = [str(checkpointer.latest_valid())]
    attempts = [
        lambda: checkpointer.load(Path(folder) / "step_00000002", {"w": torch.zeros(3)}),
        lambda: checkpointer.load(Path(folder) / "step_00000001", {"w": torch.zeros(3 + rank)}),
        lambda: checkpointer.load(Path(folder) / "nowhere", {}),
        lambda: checkpointer.resolve("none"),
    ]
    for attempt in attempts:
        try:
            attempt()
        except UserError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("name", ["__0_0.distcp", "extra.json", "metadata.json", "manifest.json"])
def test_every_rank_is_refused_in_the_same_words(tmp_path, name):
    """Whichever rank checks the damaged file, and whichever rank's tensors do not fit."""
    checkpointer = Checkpointer(tmp_path)
    for step in (1, 2):
        checkpointer.save(step, {"w": torch.ones(3)}, {})
    path = tmp_path / "step_00000002" / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    first, other = run_ranks(_refusals, 2, str(tmp_path))
    assert other == first
    assert first[0].endswith("step_00000001")
    assert f"damaged or incomplete: {name}: " in first[1]
    assert "w is float32[3] in the checkpoint and float32[4] here" in first[2]
    assert "there is no checkpoint at" in first[3]
    assert "resume=none" in first[4]
    assert len(first) == 5


def _alone(rank: int, world: int, folder: str, async_save: bool, moment: str) -> str:
    """Rank 1 leaves as a killed process does: its connections close. Rank 0 must notice, and save nothing."""
    checkpointer = Checkpointer(Path(folder), async_save=async_save)
    checkpointer.save(1, {"w": torch.ones(3)}, {})
    checkpointer.wait()
    gone = Path(folder, "done")
    if rank == 1:
        del checkpointer
        dist.destroy_process_group()
        while not gone.exists():
            time.sleep(0.01)
        return ""
    try:
        if moment == "save":
            checkpointer.save(2, {"w": torch.ones(3)}, {})
            checkpointer.wait()
        else:
            checkpointer.latest_valid()
        return "no error"
    except PeerLostError as error:
        return str(error)
    finally:
        gone.touch()


@pytest.mark.parametrize(("async_save", "moment"), [(False, "save"), (True, "save"), (False, "find")])
def test_a_dead_rank_is_noticed(tmp_path, async_save, moment):
    message = run_ranks(_alone, 2, str(tmp_path), async_save, moment, timeout=30)[0]
    assert message.startswith("lost contact with another rank while "), message
    assert not (tmp_path / "step_00000002").exists()


def _gone_folder(rank: int, world: int, folder: str) -> str:
    checkpointer = Checkpointer(Path(folder))
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder)
        Path(folder).write_text("a file in its place")
    dist.barrier()
    try:
        checkpointer.save(1, {"w": torch.ones(3)}, {})
        return "no error"
    except UserError as error:
        return str(error)


def test_a_folder_that_disappears_is_an_error_on_all(tmp_path):
    for message in run_ranks(_gone_folder, 2, str(tmp_path / "c")):
        assert "step_00000001 was not saved: rank 0: Not a directory" in message


def test_one_process_reads_the_model_from_a_sharded_save(tmp_path):
    wanted = run_ranks(saved_by, 2, str(tmp_path / "checkpoints"), False)[0]
    model, _ = build(4, sharded=False)
    assert load_checkpoint(tmp_path, model_tensors(model), prefix="model.") == {"rank": 0}
    assert values(model_tensors(model)) == {n: v for n, v in wanted.items() if n.startswith("model.")}
