"""One optimizer step of a small fp64 model on eight uneven sequences, cut into any micro-batches and ranks.

Shapes: B sequences, S positions, V vocabulary, D model, E experts. A layout may not change what a step does:
loss, metrics, and the gradient of every parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.data import Batch
from moetrain.models.decoder import Decoder
from moetrain.models.options import ModelConfig
from moetrain.moe.balance import LossTerm, RunningLoad
from moetrain.moe.options import ExpertsConfig, RouterConfig
from moetrain.moe.routers.topk import TopKOptions
from moetrain.parallel.apply import parallelize
from moetrain.parallel.mesh import Meshes
from moetrain.train.engine import NativeEngine
from moetrain.train.log.monitor import LossMonitor
from moetrain.train.optim.build import build_optimizer
from moetrain.train.optim.options import AdamWConfig
from moetrain.train.step import StepResult, TrainStep
from moetrain.train.task import NextToken
from moetrain.verify.batches import cut, mixed

B, S, V, E = 8, 11, 29, 7
MODEL = ModelConfig(
    d_model=12, num_layers=3, num_heads=2, d_ff=10, num_experts=E, d_ff_expert=5, num_shared_experts=1,
    first_dense=1,
)  # fmt: skip
# Noise, and a capacity that drops: both must follow the sample, wherever it is computed.
ROUTER = TopKOptions(top_k=2, capacity_factor=1.2, min_capacity=1, jitter=0.1)
FORMS = ("switch", "gshard_first", "sum_over_k")


def terms(form: str, scope: str) -> list[LossTerm]:
    return [LossTerm(form, 0.5, scope), LossTerm("z", 0.1, "micro")]


def batch(seed: int = 0) -> Batch:
    """All eight sequences; each is two documents, the second from its middle on."""
    return mixed(B, S, V, seed)


class Recorder(torch.optim.Optimizer):
    """An optimizer that keeps the gradients it is given, whole, and changes nothing."""

    def __init__(self, params: Sequence[torch.nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.0})
        self.gradients: list[Tensor | None] = []

    def step(self, closure: Any = None) -> None:
        params = self.param_groups[0]["params"]
        self.gradients = [None if p.grad is None else whole_tensor(p.grad).clone() for p in params]


def whole_tensor(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def build(recompute: bool, meshes: Meshes, router: RouterConfig = ROUTER) -> NextToken:
    torch.manual_seed(3)
    task = NextToken(Decoder(MODEL, router, ExpertsConfig(), V).double())
    with torch.no_grad():  # larger than a model begins with, so that every path matters
        for parameter in task.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
            parameter.mul_(5.0 if parameter.ndim > 1 else 1.0)
    return parallelize(task, meshes, recompute=recompute)


@dataclass
class Outcome:
    """What a step did: gradients (or weights) by name, and its figures."""

    tensors: dict[str, Tensor]
    figures: dict[str, float]


def gradients(
    losses: Sequence[LossTerm], micro: int, recompute: bool = False, rank: int = 0, world: int = 1,
    meshes: Meshes | None = None, whole: Batch | None = None, repeat: int = 1, router: RouterConfig = ROUTER,
) -> Outcome:  # fmt: skip
    """One step on ``batch()`` or ``whole``, the last of ``repeat``; every rank returns the same."""
    task = build(recompute, meshes or Meshes(), router)
    recorder = Recorder(list(task.parameters()))
    running = RunningLoad(dict.fromkeys(range(1, MODEL.num_layers), E))
    loads = torch.arange((MODEL.num_layers - 1) * E).view(-1, E) % 5
    running.update(dict(zip(running.shares, loads, strict=True)))
    controllers = [running] if any(term.scope == "running" for term in losses) else []
    step = TrainStep(NativeEngine(task, recorder), losses, controllers, LossMonitor(), clip_norm=None, seed=2)
    for _ in range(repeat):
        result = step.run(3, cut(whole or batch(), micro, rank, world))
    names = [name for name, _ in task.named_parameters()]
    found = zip(names, recorder.gradients, strict=True)
    return Outcome({name: grad for name, grad in found if grad is not None}, figures(result))


def weights_after_three_steps(
    micro: int, recompute: bool = False, rank: int = 0, world: int = 1, meshes: Meshes | None = None,
    router: RouterConfig = ROUTER,
) -> Outcome:  # fmt: skip
    """Three AdamW steps on three batches, every one of them clipped."""
    task = build(recompute, meshes or Meshes(), router)
    optimizer = build_optimizer(task, AdamWConfig(lr=0.01))
    step = TrainStep(
        NativeEngine(task, optimizer), terms("switch", "global_batch"), [], LossMonitor(), 0.5, seed=2
    )
    results = [step.run(number, cut(batch(number), micro, rank, world)) for number in range(3)]
    assert all(result.grad_norm > 1 and result.problem is None for result in results)
    weights = {name: whole_tensor(parameter).clone() for name, parameter in task.named_parameters()}
    return Outcome(weights, {f"{n}/{k}": v for n, r in enumerate(results) for k, v in figures(r).items()})


def figures(result: StepResult) -> dict[str, float]:
    aux = {
        f"{key}/{layer}": value for key, values in result.aux.items() for layer, value in enumerate(values)
    }
    own = {"loss": result.loss, "grad_norm": result.grad_norm, "tokens": float(result.tokens)}
    return own | aux | result.routing.metrics()


def assert_same(one: Outcome, other: Outcome, tolerance: float = 1e-10, trivial: str = "") -> None:
    """Every tensor and every figure agree to ``tolerance``, and none is zero but those named ``trivial``."""
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.dtype == torch.float64
        assert tensor.abs().max() > 1e-4 or (trivial and trivial in name), name
        difference = float((other.tensors[name] - tensor).abs().max())
        assert difference <= tolerance, (name, difference)
    assert_close_figures(one.figures, other.figures, tolerance)


def assert_close_figures(one: Mapping[str, float], other: Mapping[str, float], tolerance: float) -> None:
    assert one.keys() == other.keys()
    apart = {key: (value, other[key]) for key, value in one.items() if abs(value - other[key]) > tolerance}
    assert not apart


def router_difference(one: Outcome, other: Outcome) -> float:
    names = [name for name in one.tensors if ".router." in name]
    return max(float((one.tensors[name] - other.tensors[name]).abs().max()) for name in names)
