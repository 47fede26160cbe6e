"""Quantile balancing through the trainer's step: what must not move the bias, and what it takes.

Ranks are in tests/dist/test_parity.py, the bias itself in tests/moe/balance/test_quantile.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import tiny
import torch
from invariance import MODEL, Recorder, V, batch, build, cut
from torch import Tensor

from moetrain.data import Batch
from moetrain.moe.balance import LossTerm, QuantileController
from moetrain.moe.routers.topk import Score, TopKOptions
from moetrain.parallel.mesh import Meshes
from moetrain.train import step as step_module
from moetrain.train.engine import NativeEngine
from moetrain.train.log.monitor import LossMonitor
from moetrain.train.step import TrainStep

ROUTER = TopKOptions(top_k=2, score=Score.sigmoid, capacity_factor=1.2, min_capacity=1)
RUN = ["router=sigmoid", "balance=quantile", "train.steps=3"]


def biases(micro: int, recompute: bool = False, whole: Batch | None = None, steps: int = 2) -> list[Tensor]:
    """Each layer's bias after some steps on the batch of eight uneven sequences, weights as they were."""
    task = build(recompute, Meshes(), ROUTER)
    routers = task.model.routers()
    engine = NativeEngine(task, Recorder(list(task.parameters())))
    losses = [LossTerm("switch", 0.5, "global_batch")]  # counts ahead: another forward, which is not measured
    step = TrainStep(engine, losses, [QuantileController(routers)], LossMonitor(), None, seed=2)
    for number in range(steps):
        step.run(number, cut(whole or batch(), micro))
    return [router.bias_E for router in routers.values()]


@cache
def whole_step() -> list[Tensor]:
    """One micro-batch of everything, nothing recomputed."""
    found = biases(8)
    assert len(found) == MODEL.num_layers - 1
    assert all(float(bias_E.std()) > 0.03 for bias_E in found)
    return found


@pytest.mark.parametrize(("micro", "recompute"), [(8, True), (4, False), (2, True), (1, False), (1, True)])
def test_neither_accumulation_nor_recompute_moves_the_bias(micro: int, recompute: bool) -> None:
    assert all(map(torch.equal, whole_step(), biases(micro, recompute)))


def test_padding_does_not_move_the_bias() -> None:
    one = batch()
    ids_BS = one.input_ids_BS.where(one.valid_BS, (one.input_ids_BS + 3) % V)
    assert not torch.equal(ids_BS, one.input_ids_BS)
    assert all(map(torch.equal, whole_step(), biases(4, whole=replace(one, input_ids_BS=ids_BS))))


def test_the_bias_is_of_the_last_step_alone() -> None:
    """Nothing is left over from one step's histograms to the next."""
    one, two = biases(4, steps=1), biases(4, steps=2)
    assert not any(map(torch.equal, one, two))
    again = biases(2, steps=2)
    assert all(map(torch.equal, two, again))


def test_all_layers_histograms_are_one_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, list[list[tuple[object, ...]]]] = {}

    def counted(*tensors: Tensor, name: str, group: object = None) -> None:
        calls.setdefault(name, []).append([(t.dtype, tuple(t.shape)) for t in tensors])

    monkeypatch.setattr(step_module, "all_reduce_sum_", counted)
    biases(2, steps=1)
    layers = MODEL.num_layers - 1
    assert calls["what controllers measure"] == [[(torch.int32, (MODEL.num_experts, 1000))] * layers]


@pytest.mark.usefixtures("training")
def test_evaluation_does_not_move_the_bias(corpus, tmp_path):
    """With one evaluation a step, or none: the same run, and a bias that is no longer what it began with."""
    found = []
    for name, every in (("often", 1), ("never", 0)):
        run = tmp_path / name
        assert tiny.train(corpus, run, *RUN, f"train.eval_every={every}") == 0
        tensors, _ = tiny.contents(tiny.checkpoint(run, 3))
        found.append(tensors)
    assert not [key for key, tensor in found[0].items() if not tensor.equal(found[1][key])]
    biases = [tensor for key, tensor in found[0].items() if key.endswith("router.bias_E")]
    assert biases
    assert all(float(bias_E.abs().max()) > 0 for bias_E in biases)
