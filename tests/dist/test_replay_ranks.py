"""Routing replay where ranks share the experts: one process's record forced on two ranks, and the reverse."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from lives import Lives

GIVEN = ["router=sigmoid", "model.num_experts=4", "balance=quantile", "train.steps=3", "train.eval_every=0"]
OTHER = ["model.init_std=0.05"]  # whose routers would choose otherwise
RANKS = ["parallel.ep=2", "train.micro_batch_size=1"]
LOADS = [f"moe/{layer}/{figure}" for layer in (0, 1) for figure in ("max_load", "load_cv")]


def on_ranks(corpus: Path, run: Path, *overrides: str) -> None:
    with Lives([tiny.command(corpus, run, *GIVEN, *RANKS, *overrides)] * 2, run.parent) as lives:
        assert lives.codes() == [0, 0], [lives.output(rank) for rank in range(2)]


def loads(run: Path) -> list[list[float]]:
    return [[row[key] for key in LOADS] for row in tiny.steps(run)]


@pytest.mark.real
@pytest.mark.usefixtures("training")
def test_a_record_fits_ranks_and_one_process(corpus: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert tiny.train(corpus, one, *GIVEN, f"replay.record={tmp_path}/of_one") == 0
    on_ranks(corpus, two, *OTHER, f"replay.force={tmp_path}/of_one", f"replay.record={tmp_path}/of_two")
    assert loads(two) == loads(one)
    first = [row["train/loss"] for row in tiny.steps(one)]
    assert [row["train/loss"] for row in tiny.steps(two)] != first
    files = [f"step_{step:08d}.rank_{rank:05d}.safetensors" for step in (1, 2, 3) for rank in (0, 1)]
    assert tiny.files(tmp_path / "of_two") == ["routes.json", *files]
    back, free = tmp_path / "back", tmp_path / "free"
    assert tiny.train(corpus, back, *GIVEN, f"replay.force={tmp_path}/of_two") == 0
    assert loads(back) == loads(one)
    assert [row["train/loss"] for row in tiny.steps(back)] == first  # its own experts again
    assert tiny.train(corpus, free, *GIVEN, *OTHER) == 0
    assert loads(free) != loads(one)
