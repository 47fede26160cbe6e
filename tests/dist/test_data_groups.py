"""Ranks that hold the same samples count once: an axis that splits no samples changes nothing of a step.

Two pairs of ranks; each pair shards the model over itself and reads all samples, as the places of a tensor
axis would.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from invariance import MODEL, B, E, Outcome, Recorder, assert_same, batch, build, figures, terms
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from moetrain.moe.balance import RunningLoad
from moetrain.moe.routers.dynmoe import DynMoEOptions
from moetrain.parallel.distributed import rank, world
from moetrain.parallel.mesh import DataGroups, Meshes
from moetrain.parallel.ranks import run_ranks
from moetrain.train.engine import NativeEngine
from moetrain.train.evaluate import evaluate
from moetrain.train.log.monitor import LossMonitor
from moetrain.train.step import TrainStep
from moetrain.verify.batches import cut

ROUTERS = {"top-k": None, "with statistics": DynMoEOptions()}


def pairs() -> Meshes:
    """Ranks 0 and 1, and ranks 2 and 3."""
    both = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("copy", "dp_replicate", "dp_shard"))
    own = both["dp_shard"].get_group()
    return Meshes(1, 2, 1, both["dp_replicate", "dp_shard"], data=DataGroups(own, own))


def step_of(meshes: Meshes, name: str) -> tuple[Outcome, tuple[float, int], dict[str, Tensor]]:
    """What a step does, the loss of an evaluation, and the routers' state after the step."""
    router = ROUTERS[name]
    task = build(False, meshes, *([router] if router else []))
    recorder, running = (
        Recorder(list(task.parameters())),
        RunningLoad(dict.fromkeys(range(1, MODEL.num_layers), E)),
    )
    step = TrainStep(
        NativeEngine(task, recorder),
        terms("sum_over_k", "global_batch"),
        [running],
        LossMonitor(),
        None,
        2,
        meshes.data.loss,
    )
    share = cut(batch(), B // 4, rank(meshes.data.batch), world(meshes.data.batch))
    result = step.run(3, share)
    assert result.routing.sums_F[-3] == result.tokens  # of the last layer, before chunks and experts used
    names = [name for name, _ in task.named_parameters()]
    found = {n: g for n, g in zip(names, recorder.gradients, strict=True) if g is not None}
    total, _ = evaluate(task, share, [], seed=0, group=meshes.data.loss)
    return Outcome(found, figures(result)), (total.nats, total.tokens), dict(task.named_buffers())


def step_of_pairs(rank: int, world: int, name: str) -> tuple[Outcome, tuple[float, int], dict[str, Tensor]]:
    found = step_of(pairs(), name)
    dist.barrier()
    return found


@pytest.mark.parametrize("name", ROUTERS)
def test_a_step_of_two_pairs_is_that_of_one_process(name):
    expected, (nats, tokens), state = step_of(Meshes(), name)
    for outcome, evaluation, buffers in run_ranks(step_of_pairs, 4, name):
        assert_same(expected, outcome)
        assert evaluation == (pytest.approx(nats, rel=1e-12), tokens)
        assert buffers.keys() == state.keys()
        for key, buffer in buffers.items():
            torch.testing.assert_close(buffer, state[key], rtol=1e-10, atol=1e-12, msg=key)
