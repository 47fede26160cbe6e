"""Row-wise state of large tables over ranks: the same run as on one, continued on another number of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from layer_cases import COMMAND
from lives import Lives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from moetrain.parallel.ranks import run_ranks
from moetrain.train.optim.row_wise import mean_squares

RUN = ["train.steps=4", "checkpoint.every=2", "checkpoint.keep_last=9", "train.precision=fp64"]
RUN += ["train.micro_batch_size=1"]


def squares(rank: int, world: int) -> list[float]:
    """The largest error of rows' means: rows cut, columns cut, columns cut unevenly, and rows unevenly."""
    mesh, errors = init_device_mesh("cpu", (world,)), []
    for shape, dim in (((6, 4), 0), ((6, 4), 1), ((6, 3), 1), ((5, 4), 0)):
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        means = mean_squares(distribute_tensor(whole, mesh, [Shard(dim)])).full_tensor()
        errors.append(float((means[:, 0] - whole.square().mean(1)).abs().max()))
    dist.barrier()
    return errors


def test_a_rows_mean_is_of_the_whole_row_on_every_layout() -> None:
    for errors in run_ranks(squares, 2):
        assert max(errors) < 1e-14


@pytest.mark.real
@pytest.mark.parametrize("tables", ["row_adam", "row_adagrad"])
def test_a_run_with_rows_state_goes_on_anywhere(tables: str, corpus: Path, tmp_path: Path) -> None:
    options = [*RUN, *COMMAND["peer"], f"optim.tables={tables}"]
    one, several = tmp_path / "one", tmp_path / "several"
    with tiny.alone():
        assert tiny.train(corpus, one, *options) == 0
    finish(corpus, several, *options)
    moved = cut(several, tmp_path / "a"), cut(one, tmp_path / "b")
    with tiny.alone():
        assert tiny.train(corpus, moved[0], *options) == 0
    finish(corpus, moved[1], *options)
    theirs, _ = tiny.contents(tiny.checkpoint(one, 4))
    assert theirs["optim.blocks.0.feed_forward.experts.w_up_ND.row_square"].shape == (25, 1)
    for run in (several, *moved):
        mine, _ = tiny.contents(tiny.checkpoint(run, 4))
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.allclose(mine[name].double(), tensor.double(), rtol=0, atol=1e-9), name


def finish(corpus: Path, run: Path, *overrides: str) -> None:
    with Lives([tiny.command(corpus, run, *overrides)] * 2, run.parent) as lives:
        assert lives.codes() == [0, 0], [lives.output(rank) for rank in range(2)]


def cut(run: Path, copy: Path) -> Path:
    shutil.copytree(run, copy)
    shutil.rmtree(tiny.checkpoint(copy, 4))
    return copy
