"""What a layout decides of a router: the experts that a local repair takes for a token's own."""

from __future__ import annotations

import pytest
import torch

from moetrain.config.checked import checked
from moetrain.data import TrainLoader
from moetrain.errors import UserError
from moetrain.moe.local_experts import device_of
from moetrain.train.changes import compare

LOCAL = ["router.repair=local", "router.capacity_factor=1.0", "model.num_experts=8", "data.seq_len=64"]
LOCAL += ["train.global_batch_tokens=3072", "train.micro_batch_size=2"]  # 48 sequences


class Rows:
    """A split that hands back where its rows stand."""

    fingerprint = "none"

    def batch(self, rows, positions):
        return positions


class Straight:
    """An order that changes nothing."""

    seed, description = 0, ""

    def __call__(self, positions):
        return positions


@pytest.mark.parametrize(
    ("world", "ep", "replicate"), [(2, 2, 1), (4, 2, 1), (4, 4, 1), (4, 2, 2), (8, 4, 2), (8, 2, 2)]
)
def test_a_rank_reads_the_sequences_of_its_own_experts(world: int, ep: int, replicate: int) -> None:
    """Experts lie on the mesh [dp_replicate, efsdp, ep]: rank r has the block r mod ep."""
    cfg, _ = checked([*LOCAL, f"parallel.ep={ep}", f"parallel.dp_replicate={replicate}"], world)
    devices, sequences = cfg.router.local_devices, cfg.router.local_sequences
    assert (devices, sequences) == (ep, 48 // world)
    for rank in range(world):
        loader = TrainLoader(Rows(), Straight(), 2, 48, rank, world)
        for start in (0, 48, 5 * 48):
            for rows in loader.build(start):
                found = device_of(torch.from_numpy(rows), devices, sequences)
                assert found.tolist() == [rank % ep] * 2


def test_what_was_said_stays_and_one_device_is_refused() -> None:
    said = ["router.local_devices=4", "router.local_sequences=3"]
    for more, world in (([], 1), (["parallel.ep=2"], 2)):
        router = checked([*LOCAL, *said, *more], world)[0].router
        assert (router.local_devices, router.local_sequences) == (4, 3)
    with pytest.raises(UserError, match=r"router\.repair=local is of the experts of a token's own"):
        checked(LOCAL, 1)
    router = checked(["router.capacity_factor=1.0", "parallel.ep=2"], 2)[0].router
    assert (router.local_devices, router.local_sequences) == (None, None)


def test_another_layout_is_another_function_refused_on_resume() -> None:
    before, _ = checked([*LOCAL, "parallel.ep=2"], 2)
    with pytest.raises(UserError, match=r"router.local_devices=2, and now router.local_devices=4"):
        compare(before, checked([*LOCAL, "parallel.ep=4"], 4)[0], "runs/mine")
    with pytest.raises(UserError, match=r"router.local_sequences=24, and now router.local_sequences=12"):
        compare(before, checked([*LOCAL, "parallel.ep=2"], 4)[0], "runs/mine")
    said = ["router.local_devices=2", "router.local_sequences=24"]
    assert compare(before, checked([*LOCAL, *said, "parallel.ep=4"], 4)[0], "runs/mine") == []
