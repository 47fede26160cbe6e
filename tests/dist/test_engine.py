"""The engine behind a step: it is asked for all that a step does, and gives gathered weights back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from invariance import Recorder, batch, build, cut, terms
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.parallel.mesh import Meshes, build_meshes
from moetrain.parallel.options import ParallelConfig
from moetrain.parallel.ranks import run_ranks
from moetrain.train.engine import NativeEngine
from moetrain.train.log.monitor import LossMonitor
from moetrain.train.optim.build import build_optimizer
from moetrain.train.optim.options import AdamWConfig
from moetrain.train.step import TrainStep
from moetrain.train.task import TaskOutput, batch_arguments

CALLS: Counter[str] = Counter()


class Counting(NativeEngine):
    def forward(self, arguments: Mapping[str, object], last: bool) -> TaskOutput:
        CALLS[f"forward, last {last}"] += 1
        return super().forward(arguments, last)

    def backward(self, loss: Tensor) -> None:
        CALLS["backward"] += 1
        super().backward(loss)

    def clip(self, max_norm: float | None) -> Tensor:
        CALLS["clip"] += 1
        return super().clip(max_norm)

    def update(self) -> None:
        CALLS["update"] += 1
        super().update()


@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_a_step_asks_its_engine_for_all_it_does(clip_norm: float | None) -> None:
    CALLS.clear()
    weights = []
    for kind in (NativeEngine, Counting):
        task = build(False, Meshes())
        engine = kind(task, build_optimizer(task, AdamWConfig()))
        assert engine.set_lr(0.5) == 0.0005
        step = TrainStep(engine, terms("switch", "global_batch"), [], LossMonitor(), clip_norm, seed=2)
        for number in range(2):
            assert step.run(number, cut(batch(number), 4, 0, 1)).problem is None
        assert not any(isinstance(gradient, Tensor) for gradient in engine.gradients().values())
        weights.append([p.detach().clone() for p in task.parameters()])
    assert CALLS == {"forward, last False": 2, "forward, last True": 2, "backward": 4, "clip": 2, "update": 2}
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def whole_or_not(rank: int, world: int) -> dict[str, bool]:
    """Moment -> whether the embedding is whole on this rank."""
    task = build(False, build_meshes(ParallelConfig(), world))
    engine = NativeEngine(task, Recorder(list(task.parameters())))

    def whole() -> bool:
        return not isinstance(task.model.embed_VD, DTensor)

    found = {"before": whole()}
    with torch.no_grad(), engine.forward_only():
        task(**batch_arguments(batch(), seed=2, step=0))
        found["evaluating"] = whole()
    found["evaluated"] = whole()
    with torch.no_grad(), engine.gathered():
        found["sampling"] = whole()
        assert task.model(batch().input_ids_BS).hidden_BSD.isfinite().all()
    found["sampled"] = whole()
    return found


def test_gathered_weights_are_given_back() -> None:
    want = {"before": False, "evaluating": True, "evaluated": False, "sampling": True, "sampled": False}
    assert run_ranks(whole_or_not, 2) == [want] * 2
