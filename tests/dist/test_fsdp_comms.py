"""Every collective of FSDP2 is told by name, whatever the layout, and none is left open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from invariance import MODEL, ROUTER, Recorder, V, batch, cut

from moetrain.models.decoder import Decoder
from moetrain.moe.dispatch.collectives import Collective
from moetrain.moe.options import ExpertsConfig
from moetrain.parallel.apply import parallelize
from moetrain.parallel.mesh import build_meshes
from moetrain.parallel.options import ParallelConfig
from moetrain.parallel.ranks import run_ranks
from moetrain.train.engine import NativeEngine
from moetrain.train.log.monitor import LossMonitor
from moetrain.train.step import TrainStep
from moetrain.train.task import NextToken

GATHER, REDUCE, SUM = (
    "weights (all_gather)",
    "gradients (reduce_scatter)",
    "gradients of the replicas (all_reduce)",
)


def told(rank: int, world: int, layout: ParallelConfig) -> tuple[dict[str, list[str]], int]:
    """What an observer of a step with two micro-batches heard, by module; and what it heard no end of."""
    heard: dict[str, list[str]] = {}
    within: list[Collective] = []

    @contextmanager
    def observer(collective: Collective) -> Iterator[None]:
        within.append(collective)
        yield
        assert within.pop() is collective
        heard.setdefault(collective.layer, []).append(f"{collective.name} ({collective.kind})")

    task = NextToken(Decoder(MODEL, ROUTER, ExpertsConfig(), V).double())
    parallelize(task, build_meshes(layout, world), observer=observer)
    engine = NativeEngine(task, Recorder(list(task.parameters())))
    step = TrainStep(engine, [], [], LossMonitor(), clip_norm=None, seed=2)
    step.run(0, cut(batch(), 4 // world, rank, world))
    return heard, len(within)


@pytest.mark.parametrize(
    ("world", "layout", "reduced"),
    [
        (2, ParallelConfig(dp_replicate=2), [SUM]),
        (2, ParallelConfig(), [REDUCE]),
        (4, ParallelConfig(dp_replicate=2), [REDUCE, SUM]),
    ],
)
def test_every_module_is_named_and_gradients_are_summed_once(world, layout, reduced):
    for heard, unfinished in run_ranks(told, world, layout):
        assert unfinished == 0
        assert heard.keys() == {"model", "blocks.0", "blocks.1", "blocks.2"} | {
            f"blocks.{layer}.feed_forward.router" for layer in (1, 2)
        }
        for told_of_one in heard.values():
            assert [what for what in told_of_one if what != GATHER] == reduced
            assert (GATHER in told_of_one) == (layout.dp_replicate < world)
